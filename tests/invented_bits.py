"""Invented results of notebook 08, in the form it writes them."""

from pathlib import Path

import pandas as pd

SETTINGS = ("KineVLM nf4", "KineVLM bf16", "KineVLM full", "SmolVLM-135M nf4")
PARTS = (
    "weights",
    "constants",
    "adapters",
    "optimizer",
    "inputs",
    "gradients",
    "activations",
    "logits",
    "working",
    "unexplained",
    "peak",
)


def write_bits(folder: Path) -> None:
    for write in (_summary, _tests, _layers, _planner, _sizes, _stated):
        write(folder)


def _summary(folder: Path) -> None:
    rows = []
    for bits, size, nll in (
        ("bf16", 16, 0.40),
        ("int8", 8.1, 0.40),
        ("nf4", 4.2, 0.42),
        ("fp4", 4.2, 0.43),
        ("mixed-25", 7, 0.41),
        ("random-25", 7, 0.42),
        ("int2", 2.5, 0.9),
    ):
        rows += [("held", bits, "linear_bits", size), ("held", bits, "weight_bytes", 4e5 * size)]
        rows += [
            ("source", bits, "nll", nll),
            ("source", bits, "slot_frac", 0.9 - nll / 9),
            ("source", bits, "token_accuracy_frac", 0.8),
        ]
        if bits in ("bf16", "nf4", "int2"):
            rows += [(domain, bits, "nll", nll + 0.3) for domain in ("language", "visual")]
    frame = pd.DataFrame(rows, columns=["domain", "arm", "metric", "value"])
    scored = frame["domain"] != "held"
    frame["low"], frame["high"] = (frame["value"].where(scored) * by for by in (0.98, 1.02))
    planner = [
        ("planner", model, metric, value)
        for model in ("all", "KineVLM", "SmolVLM-135M")
        for metric, value in (
            ("settings_count", 20),
            ("within_count", 20),
            ("training_worst_frac", 0.03),
            ("generation_worst_frac", 0.04),
        )
    ]
    claims = [("stated", size, "verdict", "denied") for size in ("0.5b", "0.6b", "1b", "3b", "7b")]
    claims += [("tuned", "all", "seeds_count", 5)]
    claims += [
        ("stated", "all", f"{word}_count", n)
        for word, n in (("supported", 0), ("denied", 5), ("undecided", 0))
    ]
    more = pd.DataFrame([*planner, *claims], columns=["domain", "arm", "metric", "value"])
    pd.concat([frame.astype({"value": object}), more]).to_csv(folder / "summary.csv", index=False)


def _tests(folder: Path) -> None:
    columns = [
        "domain",
        "comparison",
        "metric",
        "value",
        "low",
        "high",
        "claim",
        "margin",
        "p",
        "p_holm",
        "smallest_effect",
        "verdict",
    ]
    asked = [
        ("source", "int8_vs_bf16", "equivalent"),
        ("source", "nf4_vs_bf16", "equivalent"),
        ("source", "fp4_vs_bf16", "equivalent"),
        ("source", "mixed-25_vs_nf4", "greater"),
        ("source", "bf16_vs_int2", "greater"),
    ]
    asked += [
        (domain, pair, claim)
        for domain in ("language", "visual")
        for pair, claim in (
            ("nf4_vs_bf16", "equivalent"),
            ("fp4_vs_bf16", "equivalent"),
            ("mixed-25_vs_nf4", "greater"),
            ("bf16_vs_int2", "greater"),
        )
    ]
    rows = [
        (
            domain,
            pair,
            "nll",
            -0.01,
            -0.02,
            0.01,
            claim,
            0.05 if claim == "equivalent" else None,
            0.01,
            0.04,
            0.02,
            "supported",
        )
        for domain, pair, claim in asked
    ]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "tests.csv", index=False)


def _layers(folder: Path) -> None:
    errors = {
        "error_int8": 0.006,
        "error_nf4": 0.09,
        "error_fp4": 0.11,
        "error_int3": 0.18,
        "error_int2": 0.42,
    }
    rows = [
        {
            "place": n,
            "layer": f"model.language_model.layers.{n}.mlp.up_proj",
            "modality": "text",
            "entries": 98304,
            **errors,
            "fisher": 0.1 * n,
            "harm_nf4": 1e-4 * n,
        }
        for n in range(1, 12)
    ]
    pd.DataFrame(rows).to_csv(folder / "layers.csv", index=False)


def _planner(folder: Path) -> None:
    rows, parts, flops = [], [], []
    for number, setting in zip((0, 1, 10, 12), SETTINGS, strict=True):
        model, bits = setting.split()
        size = 20.0 * (1 + number)
        peaks = {
            f"{title}_{name}": value
            for title in ("training", "generation")
            for name, value in (
                ("predicted_mb", size),
                ("measured_mb", 1.02 * size),
                ("ratio", 1 / 1.02),
                ("within", "yes"),
            )
        }
        rows.append(
            {
                "number": number,
                "model": model,
                "bits": "nf4" if bits == "full" else bits,
                "full": bits == "full",
                "frames": 8,
                "prompt": 8,
                "answer": 16,
                "batch": 4,
                "gradient_checkpointing": number == 12,
                "dtype": "bf16",
                "optimizer": "adamw_torch",
                "rank": 8,
                **peaks,
                "resident_mb": 2 * size,
            }
        )
        held = {"nf4": "NF4", "bf16": "16 bits"}.get(bits, bits)
        for phase in ("training", "generation"):
            parts += [(number, model, held, phase, part, size * 1e5, size * 1.02e5) for part in PARTS]
        parts.append((number, model, held, "training", "resident", None, size * 2e5))
        flops += [(number, model, held, of, size * 1e9, size * 1e9) for of in ("step", "token")]
    pd.DataFrame(rows).to_csv(folder / "peaks.csv", index=False)
    columns = ["number", "model", "held", "phase", "part", "predicted_bytes", "measured_bytes"]
    pd.DataFrame(parts, columns=columns).to_csv(folder / "parts.csv", index=False)
    columns = ["number", "model", "held", "of", "predicted_flops", "measured_flops"]
    pd.DataFrame(flops, columns=columns).to_csv(folder / "flops.csv", index=False)


def _sizes(folder: Path) -> None:
    rows = [
        (model, way, count, 5e6, 512, 2 * count / 1e9, 3 * count / 1e9, 1.2 * count / 1e9)
        for model, count in (("A-7B", 7.6e9), ("B-0.5B", 5e8))
        for way in ("QLoRA", "full")
    ]
    columns = [
        "model",
        "way",
        "parameters",
        "trainable",
        "tokens",
        "weights",
        "training peak",
        "generation peak",
    ]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "sizes.csv", index=False)


def _stated(folder: Path) -> None:
    rows = [
        {
            "size": size,
            "model": "A",
            "parameters": 5e8,
            "stated_fp16_gb": fp16,
            "least_gb": 1.5 * fp16,
            "full_gb": 4 * fp16,
            "stated_qlora_gb": 0.4 * fp16,
            "lean_gb": 0.3 * fp16,
            "advised_gb": 0.5 * fp16,
            "rich_gb": 2 * fp16,
            "stated_reduction_frac": 0.6,
            "lean_reduction_frac": 0.9,
            "rich_reduction_frac": 0.5,
            "fp16_verdict": "denied",
            "qlora_verdict": "undecided",
            "reduction_verdict": "undecided",
            "verdict": "denied",
            "why": "so",
        }
        for size, fp16 in (("0.5B", 2.0), ("7B", 28.0))
    ]
    pd.DataFrame(rows).to_csv(folder / "stated.csv", index=False)
