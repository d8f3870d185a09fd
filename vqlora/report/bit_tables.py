"""Tables of notebook 08: bits and quality, what layers lose, the memory planner, memory claims under test."""

import math
from pathlib import Path

from vqlora.report.cells import DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

BIT_NAMES = {
    "bf16": "16 bits",
    "int8": "int8",
    "nf4": "NF4",
    "fp4": "FP4",
    "mixed-50": r"NF4, mixed, 50\%",
    "random-50": r"NF4, random, 50\%",
    "mixed-25": r"NF4, mixed, 25\%",
    "random-25": r"NF4, random, 25\%",
    "mixed-10": r"NF4, mixed, 10\%",
    "random-10": r"NF4, random, 10\%",
    "int3": "int3 (simulated)",
    "int2": "int2 (simulated)",
}
PART_NAMES = {"weights": "Weights", "constants": "Constants of quantization", "adapters": "Adapters",
              "optimizer": "Optimizer", "inputs": "Inputs", "gradients": "Gradients",
              "activations": "Activations", "logits": "Logits", "working": "Working memory",
              "unexplained": "Not explained", "peak": "Peak", "resident": "Resident set, growth"}  # fmt: skip
ERRORS = {"int8": "int8", "nf4": "NF4", "fp4": "FP4", "int3": "int3", "int2": "int2"}
WORST = 8  # layers that the table of errors shows


def bits_table(results: Path) -> Table:
    """Bits of the base: bits a weight, memory, frozen on its source and fine-tuned on each shift."""
    frame = read_csv(results, "08_bits/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    cells = frame.drop_duplicates(["domain", "arm", "metric"]).set_index(["domain", "arm", "metric"])
    tuned = [name for name in ordered(frame["domain"], DOMAINS) if name in DOMAINS and name != "source"]
    asked = [("held", "linear_bits"), ("held", "weight_bytes"), ("source", "nll"), ("source", "slot_frac"),
             ("source", "token_accuracy_frac"), *((domain, "nll") for domain in tuned)]  # fmt: skip

    def cell(domain: str, arm: str, metric: str) -> tuple[str, str]:
        if (domain, arm, metric) not in cells.index:
            return "--", ""
        row = cells.loc[(domain, arm, metric)]
        low, high = float(row["low"]), float(row["high"])
        return format_number(float(row["value"]), metric), format_interval(low, high, metric)

    rows = []
    for arm in ordered(frame.loc[frame["domain"] == "held", "arm"], BIT_NAMES):
        found = [cell(domain, arm, metric) for domain, metric in asked]
        rows.append((label(arm, BIT_NAMES), *(value for value, _ in found)))
        rows.append(("", *(rf"{{\scriptsize {ends}}}" if ends else "" for _, ends in found)))
    heads = ("Bits a weight", "Weights", "NLL", "Slot", "Tokens", *(label(name, DOMAINS) for name in tuned))
    return Table(("Base", *heads), tuple(rows))


def bit_tests_table(results: Path) -> Table:
    """The planned comparisons of bits on NLL: gain of the first over the second, interval, verdict."""
    columns = ("domain", "comparison", "value", "low", "high", "claim", "margin", "p_holm", "verdict")
    frame, rows = read_csv(results, "08_bits/tests.csv", columns), []
    words = {"equivalent": "equals", "greater": "beats"}
    for domain in ordered(frame["domain"], DOMAINS):
        if rows:
            rows.append(None)
        for place, row in enumerate(frame[frame["domain"] == domain].to_dict("records")):
            a, b = row["comparison"].split("_vs_")
            claim = f"{label(a, BIT_NAMES)} {words[row['claim']]} {label(b, BIT_NAMES)}"
            rows.append((
                label(domain, DOMAINS) if place == 0 else "", claim, format_number(row["value"], "nll"),
                format_interval(row["low"], row["high"], "nll"),
                "--" if math.isnan(row["margin"]) else format_number(row["margin"], "margin"),
                format_number(row["p_holm"], "p_holm"), latex_text(row["verdict"]),
            ))  # fmt: skip
    heads = ("Gain", "95\\% interval", "Margin", r"\emph{p} (Holm)", "Verdict")
    return Table(("Domain", "Claim", *heads), tuple(rows), left=2)


def layer_errors_table(results: Path) -> Table:
    """The layers whose loss of precision in NF4 is expected to cost most, with the errors of other bits."""
    errors = [f"error_{bits}" for bits in ERRORS]
    frame = read_csv(results, "08_bits/layers.csv", ("layer", "modality", "entries", *errors, "harm_nf4"))
    rows = []
    for row in frame.nlargest(WORST, "harm_nf4").to_dict("records"):
        name = row["layer"].removeprefix("model.").replace("_", r"\_")
        found = (format_number(row[column], "error_frac", unit=False) for column in errors)
        rows.append((name, row["modality"], *found, f"{1e3 * row['harm_nf4']:.2f}"))
    return Table(("Layer", "Part", *ERRORS.values(), "Harm, mnat"), tuple(rows), left=2)


def planner_table(results: Path) -> Table:
    """Every setting of the planner's check: peaks predicted and measured, and whether they are near."""
    columns = ("number", "model", "bits", "full", "rank", "frames", "batch", "dtype")
    peaks = [f"{title}_{column}" for title in ("training", "generation")
             for column in ("predicted_mb", "measured_mb", "ratio", "within")]  # fmt: skip
    columns = (*columns, "gradient_checkpointing", *peaks)
    frame, rows = read_csv(results, "08_bits/peaks.csv", columns), []
    first = set(frame.groupby("model")["number"].min())
    for row in frame.sort_values("number").to_dict("records"):
        named = [part for part in (
            "full" if row["full"] else row["bits"] if row["bits"] != "bf16" else "16 bits",
            None if row["full"] else f"rank {row['rank']}", f"{row['frames']} frames",
            f"batch {row['batch']}", row["dtype"], "checkpointed" if row["gradient_checkpointing"] else None,
        ) if part]  # fmt: skip
        cells = [row["model"] if row["number"] in first else "", ", ".join(named)]
        for title in ("training", "generation"):
            cells += [f"{row[f'{title}_predicted_mb']:.1f}", f"{row[f'{title}_measured_mb']:.1f}",
                      f"{row[f'{title}_ratio']:.3f}", row[f"{title}_within"]]  # fmt: skip
        rows.append(tuple(cells))
    heads = ("Training, planned", "measured", "ratio", "near")
    return Table(("Model", "Setting", *heads, "Generation, planned", *heads[1:]), tuple(rows), left=2)


def memory_parts_table(results: Path) -> Table:
    """Measured peaks of training in MB, split into the planner's parts; planned ones in brackets."""
    columns = ("model", "held", "phase", "part", "predicted_bytes", "measured_bytes")
    frame = read_csv(results, "08_bits/parts.csv", columns)
    frame = frame[frame["phase"] == "training"]
    models = list(dict.fromkeys(zip(frame["model"], frame["held"], strict=True)))
    cells = frame.set_index(["model", "held", "part"])

    def cell(model: str, held: str, part: str) -> str:
        row = cells.loc[(model, held, part)]
        planned = f" ({row['predicted_bytes'] / 1e6:.2f})" if row["predicted_bytes"] >= 0 else ""
        return f"{row['measured_bytes'] / 1e6:.2f}{planned}"

    rows = [(name, *(cell(*model, part) for model in models)) for part, name in PART_NAMES.items()]
    return Table(("MB", *(f"{model}, {held}" for model, held in models)), tuple(rows))


def flops_table(results: Path) -> Table:
    """Operations of a training step and of a generated token, planned and counted, by bits of the base."""
    columns = ("model", "held", "of", "predicted_flops", "measured_flops")
    frame = read_csv(results, "08_bits/flops.csv", columns)
    frame = frame[frame["held"] != "full"]
    cells, rows = frame.set_index(["model", "held", "of"]), []
    for model, held in dict.fromkeys(zip(frame["model"], frame["held"], strict=True)):
        found = (format_number(float(cells.loc[(model, held, of), kind]), kind)
                 for of in ("step", "token") for kind in ("predicted_flops", "measured_flops"))  # fmt: skip
        rows.append((model, held, *found))
    heads = ("Step, planned", "counted", "Token, planned", "counted")
    return Table(("Model", "Base", *heads), tuple(rows), left=2)


def sizes_table(results: Path) -> Table:
    """Predicted training peaks of well-known models in GB, by way of training; nothing here was measured."""
    columns = ("model", "way", "parameters", "tokens", "weights", "training peak", "generation peak")
    frame, rows = read_csv(results, "08_bits/sizes.csv", columns), []
    ways = list(dict.fromkeys(frame["way"]))
    peaks = frame.pivot(index="model", columns="way", values="training peak")
    first = frame.drop_duplicates("model").set_index("model")
    for model in first.sort_values("parameters").index:
        row = first.loc[model]
        found = (f"{peaks.loc[model, way]:.1f}" for way in ways)
        rows.append((model, f"{row['parameters'] / 1e9:.2f}", str(row["tokens"]), *found))
    return Table(("Model", "Billion", "Tokens", *(latex_text(way) for way in ways)), tuple(rows))


def stated_table(results: Path) -> Table:
    """The memory claims under test beside predictions, a verdict on each number and on the row."""
    columns = ("size", "stated_fp16_gb", "least_gb", "fp16_verdict", "stated_qlora_gb", "lean_gb",
               "advised_gb", "rich_gb", "qlora_verdict", "stated_reduction_frac", "lean_reduction_frac",
               "rich_reduction_frac", "reduction_verdict", "verdict")  # fmt: skip
    frame, rows = read_csv(results, "08_bits/stated.csv", columns), []
    for row in frame.sort_values("stated_fp16_gb").to_dict("records"):
        cuts = sorted(row[f"{name}_reduction_frac"] for name in ("lean", "rich"))
        rows.append((
            row["size"], f"{row['stated_fp16_gb']:g}", f"{row['least_gb']:.1f}", row["fp16_verdict"],
            f"{row['stated_qlora_gb']:g}", f"{row['lean_gb']:.2f} to {row['rich_gb']:.1f}",
            f"{row['advised_gb']:.2f}", row["qlora_verdict"],
            format_number(row["stated_reduction_frac"], "a_frac"),
            " to ".join(format_number(cut, "a_frac", unit=False) for cut in cuts), row["reduction_verdict"],
            row["verdict"],
        ))  # fmt: skip
    heads = ("FP16, GB", "at least", "verdict", "QLoRA, GB", "range", "advised rank", "verdict", "Saved",
             "range", "verdict", "Row")  # fmt: skip
    return Table(("Size", *heads), tuple(rows))


BIT_TABLES = {
    "bit_tests": bit_tests_table,
    "bits": bits_table,
    "flops": flops_table,
    "layer_errors": layer_errors_table,
    "memory_parts": memory_parts_table,
    "planner": planner_table,
    "sizes": sizes_table,
    "stated": stated_table,
}
