"""Tables of notebook 04: what a step costs by method, growth, serving, verdicts on aims and claims."""

import math
from pathlib import Path

import pandas as pd

from vqlora.report.cells import DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

STEP_ARMS = {
    "qlora": "QLoRA (peft)",
    "lora": "LoRA, 16 bit (peft)",
    "full": "Full fine-tuning",
    "vqlora": "Ours, plain step",
    "vqlora+lean": "Ours, lean step",
    "vqlora+lean+ckpt": "Ours, lean, checkpointed",
}
STEP_PARTS = {
    "weights_bytes": "Weights",
    "constants_bytes": "Constants of quantization",
    "adapters_bytes": "Adapters",
    "optimizer_bytes": "Optimizer",
    "peak.gradients_bytes": "Gradients",
    "peak.activations_bytes": "Activations",
    "peak.logits_bytes": "Logits",
    "peak.working_bytes": "Working memory",
    "unexplained_bytes": "Not explained",
}
DTYPES = {"bf16": "16-bit", "fp32": "32-bit"}
AIMS = {"peak": "Peak above static", "time": "Step time", "total": "Total peak"}
SERVED = {("nf4", False): "NF4, adapters apart", ("nf4", True): "NF4, merged",
          ("bf16", False): "16 bits, adapters apart", ("bf16", True): "16 bits, merged"}  # fmt: skip


def main_setting(results: Path) -> dict:
    """Model, frames and rank at which the aims are read."""
    frame = read_csv(results, "04_cost/summary.csv", ("domain", "arm", "metric", "value"))
    said = frame[(frame["domain"] == "main") & (frame["arm"] == "all")].set_index("metric")["value"]
    return {"model": said["model"], "frames": int(said["frames"]), "rank": int(said["rank"])}


def main_steps(results: Path) -> pd.DataFrame:
    """Rows of runs.csv at the main setting, one an arm, with what the parts leave unexplained."""
    return with_parts(read_csv(results, "04_cost/runs.csv", ("model", "arm")), main_setting(results))


def with_parts(frame: pd.DataFrame, setting: dict) -> pd.DataFrame:
    """Rows at a setting by arm, in order; unexplained_bytes is scratch inside operations."""
    own = frame[(frame[list(setting)] == list(setting.values())).all(axis=1)].set_index("arm")
    own = own.loc[ordered(own.index, STEP_ARMS)]
    parts = [part for part in STEP_PARTS if part in own]
    return own.assign(unexplained_bytes=(own["total_bytes"] - own[parts].sum(axis=1)).clip(lower=0))


def step_costs_table(results: Path) -> Table:
    """Every method at the main setting: seconds, bytes, operations; ratios to plain QLoRA and to full."""
    frame = read_csv(results, "04_cost/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    cells = frame[(frame["domain"] == "main") & (frame["arm"] != "all")].set_index(["arm", "metric"])

    def number(arm: str, metric: str) -> str:
        if (arm, metric) not in cells.index:
            return format_number(1.0, metric) if metric.endswith(f"_{arm}") else "--"
        return format_number(float(cells.loc[(arm, metric), "value"]), metric)

    def spread(arm: str, metric: str) -> str:
        if (arm, metric) not in cells.index:
            return ""
        row = cells.loc[(arm, metric)]
        return format_interval(float(row["low"]), float(row["high"]), metric)

    rows = []
    for arm in ordered(dict.fromkeys(arm for arm, _ in cells.index), STEP_ARMS):
        told = ("cpu_s", "cpu_to_qlora", "peak_bytes", "peak_to_qlora", "total_bytes", "total_to_full",
                "resident_bytes", "step_flops", "tokens_per_second")  # fmt: skip
        rows.append((label(arm, STEP_ARMS), *(number(arm, metric) for metric in told)))
        ends = spread(arm, "cpu_to_qlora")
        if ends:
            rows.append(("", "", rf"{{\scriptsize {ends}}}", *[""] * (len(told) - 2)))
    heads = ("Step, CPU", "to QLoRA", "Peak above static", "to QLoRA", "Total peak", "to full",
             "Resident", "Operations", "Tokens a second")  # fmt: skip
    return Table(("Method", *heads), tuple(rows))


def step_ratios_table(results: Path) -> Table:
    """Our lean step against plain QLoRA and full fine-tuning in every setting: medians, intervals of time."""
    columns = ("model", "frames", "rank", "arm", "against", "what", "median", "low", "high")
    frame = read_csv(results, "04_cost/ratios.csv", columns)
    frame = frame[frame["arm"] == "vqlora+lean"].set_index(["model", "rank", "frames", "against", "what"])
    rows = []
    for model in dict.fromkeys(frame.index.get_level_values("model")):
        rows += [None] * bool(rows)
        first = model
        for rank, frames in sorted({key[1:3] for key in frame.index if key[0] == model}):
            cells = [latex_text(first), str(rank), str(frames)]
            for against, what in (("qlora", "cpu_s"), ("full", "cpu_s"), ("qlora", "peak_bytes"),
                                  ("qlora", "total_bytes"), ("full", "total_bytes"),
                                  ("qlora", "flops")):  # fmt: skip
                key = (model, rank, frames, against, what)
                row = frame.loc[key] if key in frame.index else None
                text = "--" if row is None else f"{row['median']:.2f}"
                timed = row is not None and what == "cpu_s"
                cells.append(f"{text} [{row['low']:.2f}, {row['high']:.2f}]" if timed else text)
            rows.append(tuple(cells))
            first = ""
    heads = ("Time to QLoRA", "to full", "Peak above static to QLoRA", "Total to QLoRA", "to full",
             "Operations to QLoRA")  # fmt: skip
    return Table(("Model", "Rank", "Frames", *heads), tuple(rows))


def step_parts_table(results: Path) -> Table:
    """The peak of a step at the main setting in MB, by part."""
    own = main_steps(results)
    rows = [(name, *(f"{size / 1e6:.1f}" for size in own[part])) for part, name in STEP_PARTS.items()]
    rows.append(None)
    rows.append(("Total peak", *(f"{size / 1e6:.1f}" for size in own["total_bytes"])))
    return Table(("MB", *(label(arm, STEP_ARMS) for arm in own.index)), tuple(rows))


def step_growth_table(results: Path) -> Table:
    """Growth with frames and with ranks: what each adds to peak and time, with the fit's 95% interval."""
    columns = ("along", "model", "arm", "what", "fixed", "each", "each_low", "each_high", "exponent")
    frame, rows = read_csv(results, "04_cost/growth.csv", columns), []
    for (along, model), own in frame.groupby(["along", "model"], sort=False):
        rows += [None] * bool(rows)
        cells = own.set_index(["arm", "what"])
        for place, arm in enumerate(ordered(own["arm"].unique(), STEP_ARMS)):
            found = [f"{model}, {along}" if place == 0 else "", label(arm, STEP_ARMS)]
            for what, unit in (("peak_bytes", 1e6), ("cpu_s", 1e-3)):
                row = cells.loc[(arm, what)]
                fixed, each, *ends = (
                    f"{row[name] / unit + 0.0:.2f}" for name in ("fixed", "each", "each_low", "each_high")
                )
                spread = f" [{', '.join(ends)}]" if math.isfinite(row["each_low"]) else ""
                found += [fixed, f"{each}{spread}", f"{row['exponent']:.2f}"]
            rows.append(tuple(found))
    heads = ("Peak, fixed, MB", "each, MB", "exponent", "Time, fixed, ms", "each, ms", "exponent")
    return Table(("Along", "Method", *heads), tuple(rows), left=2)


def answers_table(results: Path) -> Table:
    """Serving with adapters apart and merged, on 4 and on 16 bits: latency and memory."""
    columns = ("model", "bits", "merged", "frames", "first_token_s", "next_token_s", "static_bytes",
               "peak_bytes", "resident_bytes")  # fmt: skip
    frame, rows = read_csv(results, "04_cost/answers.csv", columns), []
    for (model, frames), own in frame.groupby(["model", "frames"], sort=False):
        rows += [None] * bool(rows)
        own = own.set_index(["bits", "merged"])
        for place, (way, name) in enumerate(SERVED.items()):
            numbers = (format_number(float(own.loc[way, column]), column) for column in columns[4:])
            rows.append((f"{model}, {frames} frames" if place == 0 else "", name, *numbers))
    heads = ("First token", "Each further", "Model", "Peak above it", "Resident")
    return Table(("Model", "Base", *heads), tuple(rows), left=2)


def aims_table(results: Path) -> Table:
    """The aims, set before anything was measured, by dtype of products: ratio, interval, limit, verdict."""
    columns = ("dtype", "aim", "value", "low", "high", "limit", "verdict", "arm", "against")
    frame = read_csv(results, "04_cost/dtypes.csv", columns).set_index(["dtype", "aim"])
    rows = []
    for dtype in dict.fromkeys(frame.index.get_level_values("dtype")):
        rows += [None] * bool(rows)
        for place, (aim, name) in enumerate(AIMS.items()):
            row = frame.loc[(dtype, aim)]
            compared = f"{label(row['arm'], STEP_ARMS)} to {label(row['against'], STEP_ARMS)}"
            once = row["low"] == row["high"]  # memory is the same in every round
            rows.append((DTYPES[dtype] if place == 0 else "", name, compared, f"{row['value']:.3f}",
                         "--" if once else f"[{row['low']:.3f}, {row['high']:.3f}]", f"{row['limit']:g}",
                         row["verdict"]))  # fmt: skip
    heads = ("Products", "Aim", "Ratio of", "Measured", "Interval", "At most", "Verdict")
    return Table(heads, tuple(rows), left=3)


def step_claims_table(results: Path) -> Table:
    """Claims made of QLoRA: what was measured over all settings, and the verdict."""
    columns = ("text", "value", "low", "high", "settings_count", "verdict")
    frame = read_csv(results, "04_cost/claims.csv", columns)
    rows = []
    for row in frame.to_dict("records"):
        low, high = (format_number(row[end], "a_frac", unit=False) for end in ("low", "high"))
        rows.append((latex_text(row["text"]), format_number(row["value"], "a_frac"), f"{low} to {high}",
                     str(row["settings_count"]), row["verdict"]))  # fmt: skip
    return Table(("Claim", "Median", "Range", "Settings", "Verdict"), tuple(rows))


def quality_losses_table(results: Path) -> Table:
    """Share of full fine-tuning's quality that QLoRA lacks, paired by seed, with its interval over seeds."""
    names = {"token_accuracy_frac": "Tokens", "slot_frac": "Slot", "cider": "CIDEr-D", "qa_frac": "QA"}
    frame = read_csv(results, "04_cost/quality.csv", ("domain", "metric", "value", "low", "high"))
    cells, rows = frame.set_index(["domain", "metric"]), []
    for domain in ordered(frame["domain"], DOMAINS):
        found = []
        for metric in names:
            there = (domain, metric) in cells.index
            row = cells.loc[(domain, metric)] if there else None
            ends = format_interval(row["low"], row["high"], "a_frac") if there else ""
            found.append(f"{format_number(row['value'], 'a_frac')} {ends}".strip() if there else "--")
        rows.append((label(domain, DOMAINS), *found))
    return Table(("Domain", *names.values()), tuple(rows))


def gpu_paths_table(results: Path) -> Table:
    """What only a card runs, and whether it was run."""
    frame = read_csv(results, "04_cost/gpu.csv", ("path", "device", "what", "status"))
    rows = tuple(tuple(map(latex_text, row)) for row in frame.itertuples(index=False, name=None))
    return Table(("Path", "Device", "What it is there", "Status"), rows, left=4)


COST_TABLES = {
    "aims": aims_table,
    "answers": answers_table,
    "gpu_paths": gpu_paths_table,
    "quality_losses": quality_losses_table,
    "step_claims": step_claims_table,
    "step_costs": step_costs_table,
    "step_growth": step_growth_table,
    "step_parts": step_parts_table,
    "step_ratios": step_ratios_table,
}
