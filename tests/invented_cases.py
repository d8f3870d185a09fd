"""Invented results of notebooks 11 and 12, for tests of the report."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vqlora.general.study import overall

COMPARED = (  # family, on, comparison, metric, gain, claim, verdict
    ("domains", "language to visual", "tuned_vs_frozen", "nll", -1.2, "no_worse", "denied"),
    ("domains", "visual to source", "tuned_vs_frozen", "nll", -0.02, "no_worse", "supported"),
    ("languages", "es", "en_vs_frozen", "nll", 0.3, "greater", "supported"),
    ("languages", "en", "together_vs_alone", "nll", -0.2, "no_worse", "denied"),
    ("languages", "es", "together_vs_alone", "nll", -0.04, "no_worse", "undecided"),
    ("tasks", "visual", "joint_vs_captions", "nll", -0.03, "no_worse", "undecided"),
    ("tasks", "visual", "joint_vs_no-contrast", "t2v_r1", 0.1, "greater", "supported"),
    ("frames", "visual", "16_vs_8", "nll", -0.01, "no_worse", "supported"),
)


def write_general(folder: Path) -> None:
    columns = ["family", "on", "comparison", "metric", "value", "claim", "verdict"]
    tests = pd.DataFrame(COMPARED, columns=columns)
    tests = tests.assign(low=tests["value"] - 0.02, high=tests["value"] + 0.02, margin=0.05, p=0.01)
    tests = tests.assign(p_holm=0.02, smallest_effect=0.04)
    shown = [*columns[:5], "low", "high", "claim", "margin", "p", "p_holm", "smallest_effect", "verdict"]
    tests[shown].to_csv(folder / "tests.csv", index=False)
    overall(tests).to_csv(folder / "overall.csv", index=False)
    rows = []
    for trained, other in (("language", "visual"), ("visual", "language")):
        for arm, nll in (("frozen", 2.0), ("joint", 0.6)):
            rows += [(trained, arm, "own", nll), (trained, arm, f"domain.{other}", nll + 1)]
            rows += [(trained, arm, "domain.source", nll + 0.5), (trained, arm, "frames.16", nll + 0.1)]
    rows += [("visual", task, "own", 0.7) for task in ("captions", "no-contrast")]
    rows += [("visual", arm, f"language.{name}", nll) for name in ("en", "es")
             for arm, nll in (("frozen", 5.0), ("joint", 4.0), ("es", 0.7), ("together", 0.9))]  # fmt: skip
    rows = [(*row[:3], metric, value) for row in rows
            for metric, value in (("nll", row[3]), ("slot_frac", 0.5), ("qa_frac", 0.6), ("t2v_r1", 0.4))]
    table = pd.DataFrame(rows, columns=["trained", "arm", "reading", "metric", "value"])
    table = table.assign(low=table["value"] - 0.05, high=table["value"] + 0.05)
    table.to_csv(folder / "summary.csv", index=False)


def write_qualitative(folder: Path) -> None:
    kinds = ("right", "wrong", "missing", "extra", "object", "motion", "order", "style")
    rows = [(domain, arm, f"{kind}_frac", 0.2, 0.1, 0.3, 10) for domain in ("language", "visual")
            for arm in ("frozen", "full", "lora", "qlora") for kind in kinds]  # fmt: skip
    columns = ["domain", "arm", "metric", "value", "low", "high", "count"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "failures.csv", index=False)
    said = [(n, domain, 0.5, f"{domain}-{n}", arm, 0.8, "a cat spins", "a dog spins", wrong)
            for n, domain in enumerate(("language", "visual"))
            for arm, wrong in (("frozen", "object, style"), ("qlora", "none"))]  # fmt: skip
    columns = ["picture", "domain", "quantile", "clip", "arm", "nll", "reference", "caption", "faults"]
    pd.DataFrame(said, columns=columns).to_csv(folder / "captions.csv", index=False)
    found = [(3 * q + n, "a cat spins", f"c{q}", 1 + q, n + 1, f"c{n}", "a dog spins", 0.5, n == q)
             for q in range(2) for n in range(3)]  # fmt: skip
    columns = ["picture", "query", "clip", "rank", "place", "found", "caption", "similarity", "right"]
    pd.DataFrame(found, columns=columns).to_csv(folder / "retrieval.csv", index=False)
    words = [(place, word, kind, t, 5 * t, cell, 1 / 16, t == 1 and kind != "", cell == 2)
             for place, (word, kind) in enumerate((("a", ""), ("cat", "object"), ("spins", "motion")))
             for t in range(4) for cell in range(4)]  # fmt: skip
    columns = ["place", "word", "kind", "shown", "frame", "cell", "weight", "here", "there"]
    pd.DataFrame(words, columns=columns).to_csv(folder / "attention.csv", index=False)
    about = [("frames", kind) for kind in ("object", "motion", "aside")]
    about += [("cell", kind) for kind in ("object", "motion")]
    values = {"share": 0.5, "even": 0.25, "others": 0.3, "gain": 0.2}
    looks = [(model, kind, what, f"{metric}_frac", value, value - 0.02, value + 0.02)
             for model in ("frozen", "tuned") for what, kind in about for metric, value in values.items()]
    columns = ["model", "kind", "what", "metric", "value", "low", "high"]
    pd.DataFrame(looks, columns=columns).to_csv(folder / "looks.csv", index=False)
    tests = [(what, kind, "gain_frac", 0.2, 0.18, 0.22, "greater", 0.001, 0.03, 0.002, "supported")
             for what, kind in about]  # fmt: skip
    columns = ["what", "kind", "metric", "value", "low", "high", "claim", "p", "smallest_effect", "p_holm",
               "verdict"]  # fmt: skip
    pd.DataFrame(tests, columns=columns).to_csv(folder / "tests.csv", index=False)
    gates = {f"{head}_{part}": 1.1 for head in ("gate", "rank") for part in ("vision", "fusion", "text")}
    times = [(clip, t, t % 3 == 0, 2 < t < 6, t in (8, 9)) for clip in ("c0", "c1") for t in range(12)]
    times = pd.DataFrame(times, columns=["clip", "frame", "shown", "moving", "aside"]).assign(**gates)
    times.loc[~times["shown"], list(gates)] = np.nan
    times.to_csv(folder / "timeline.csv", index=False)
    for name, strips in (("captions", 2), ("retrieval", 6), ("attention", 1), ("timeline", 2)):
        Image.fromarray(np.full((8 * strips, 32, 3), 90, np.uint8)).save(folder / f"{name}.png")
