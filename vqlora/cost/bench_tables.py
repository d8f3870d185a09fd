"""What the rows of `vqlora.cost.bench` say: costs, paired ratios, growth, verdicts on claims made of QLoRA.

>>> table, against = costs(rows), ratios(rows)          # doctest: +SKIP
>>> growth(table, "frames"), judge_claims(table)        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

SETTING = ["model", "frames", "rank"]
AIMS = {  # (arm, against, what) -> at most
    ("lean", "qlora", "peak_bytes"): 0.5,
    ("lean", "qlora", "cpu_s"): 0.7,
    ("lean", "full", "total_bytes"): 0.2,
}
CLAIMS = (  # what is said of QLoRA, the quantity, and the interval that it names
    ("base weights take 25% of 16 bits", "weights_frac", 0.20, 0.30),
    ("60-65% less memory than full fine-tuning", "total_saved_frac", 0.60, 0.65),
    ("83% less for weights, adapters and gradients", "held_saved_frac", 0.80, 0.86),
    ("10-20% slower than full fine-tuning", "slower_frac", 0.10, 0.20),
    ("adapters are 1-5% of the base", "adapters_frac", 0.01, 0.05),
)


def costs(rows: Iterable[Mapping]) -> pd.DataFrame:
    """One row a setting and arm: medians over rounds of seconds, bytes at the peak, tokens a second.

    total_bytes: model, optimizer state and what a step holds at its peak. CPU seconds are those of the
    process, so that other load on the machine matters little; wall seconds stand beside them.
    """
    frame = pd.DataFrame([_one(row) for row in rows])
    numbers = frame.columns.difference([*SETTING, "arm", "round"])
    table = frame.groupby([*SETTING, "arm"], sort=False)[list(numbers)].median().reset_index()
    table["tokens_per_s"] = table.tokens / table.cpu_s
    return table


def ratios(rows: Iterable[Mapping], against: Iterable[str] = ("qlora", "full")) -> pd.DataFrame:
    """Each arm over another, round by round: median, low and high (extremes over rounds), the aim if any."""
    frame = pd.DataFrame([_one(row) for row in rows])
    found = []
    for setting, group in frame.groupby(SETTING, sort=False):
        arms = {arm: part.set_index("round") for arm, part in group.groupby("arm", sort=False)}
        for below in [arm for arm in against if arm in arms]:
            for above in [arm for arm in arms if arm != below]:
                for what in ("cpu_s", "peak_bytes", "total_bytes", "resident_bytes"):
                    paired = (arms[above][what] / arms[below][what]).dropna()
                    aim = AIMS.get((above, below, what))
                    found.append(
                        {**dict(zip(SETTING, setting, strict=True)), "arm": above, "against": below,
                         "what": what, "median": paired.median(), "low": paired.min(), "high": paired.max(),
                         "rounds": len(paired), "aim": aim,
                         "met": None if aim is None else bool(paired.median() <= aim)}
                    )  # fmt: skip
    return pd.DataFrame(found)


def growth(table: pd.DataFrame, along: str) -> pd.DataFrame:
    """y = c · x^p along "frames" or "rank", fitted by least squares of logarithms, per model and arm.

    Returns model, arm, what, exponent p, r2 of the logarithms, points; only where there are three or more.
    Raises KeyError for another `along`.
    """
    if along not in ("frames", "rank"):
        raise KeyError(f"along: {along!r}; allowed: frames, rank")
    rest = [name for name in SETTING if name != along]
    found = []
    for (*_, arm), group in table.groupby([*rest, "arm"], sort=False):
        x = np.log(group[along].to_numpy(float))
        for what in ("cpu_s", "peak_bytes", "total_bytes", "flops"):
            y = np.log(group[what].to_numpy(float)) if what in group else np.array([np.nan])
            if len(set(x)) < 3 or not np.isfinite(y).all():
                continue
            exponent, constant = np.polyfit(x, y, 1)
            left = ((y - exponent * x - constant) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-30)
            found.append({"model": group.model.iloc[0], "arm": arm, "what": what, "exponent": exponent,
                          "r2": 1 - left, "points": len(x)})  # fmt: skip
    return pd.DataFrame(found, columns=["model", "arm", "what", "exponent", "r2", "points"])


def judge_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Claims of `CLAIMS` against plain QLoRA and full fine-tuning, per setting where both were measured.

    verdict: "supported" inside the interval, else "denied", with the measured number beside it.
    """
    found = []
    for setting, group in table.groupby(SETTING, sort=False):
        arms = group.set_index("arm")
        if not {"qlora", "full"} <= set(arms.index):
            continue
        values = _claimed(arms.loc["qlora"], arms.loc["full"])
        for claim, name, low, high in CLAIMS:
            verdict = "supported" if low <= values[name] <= high else "denied"
            found.append({**dict(zip(SETTING, setting, strict=True)), "claim": claim, "low": low,
                          "high": high, "measured": values[name], "verdict": verdict})  # fmt: skip
    return pd.DataFrame(found)


def _claimed(qlora: pd.Series, full: pd.Series) -> dict[str, float]:
    """The quantities that the claims are about. Full fine-tuning holds float32 weights: 16 bits are half."""
    adapters, base = 4 * qlora.trainable, full.static_bytes / 2
    held = qlora.static_bytes + adapters  # with gradients of the adapters
    return {
        "weights_frac": (qlora.static_bytes - adapters) / base,
        "total_saved_frac": 1 - qlora.total_bytes / full.total_bytes,
        "held_saved_frac": 1 - held / (2 * base),
        "slower_frac": qlora.cpu_s / full.cpu_s - 1,
        "adapters_frac": qlora.trainable / full.trainable,
    }


def _one(row: Mapping) -> dict:
    """A measurement with a number in each column."""
    out = {key: value for key, value in row.items() if not isinstance(value, list)}
    out |= {key: float(np.median(row[key])) for key in ("cpu_s", "wall_s")}
    out["total_bytes"] = row["static_bytes"] + row["optimizer_bytes"] + row["peak_bytes"]
    return out


def tables(rows: list[Mapping]) -> dict[str, pd.DataFrame]:
    """All of the above by name: costs, ratios, growth (along frames and rank), claims."""
    table = costs(rows)
    grown = [growth(table, along).assign(along=along) for along in ("frames", "rank")]
    return {
        "costs": table,
        "ratios": ratios(rows),
        "growth": pd.concat(grown, ignore_index=True),
        "claims": judge_claims(table),
    }


def show(found: Mapping[str, pd.DataFrame]) -> str:
    """The tables as text, in MB (10^6 bytes)."""
    table = found["costs"].copy()
    for name in [name for name in table if name.endswith("_bytes") and not name.startswith("peak.")]:
        table[name.replace("_bytes", "_mb")] = (table[name] / 1e6).round(1)
    chosen = [*SETTING, "arm", "cpu_s", "wall_s", "tokens_per_s", "static_mb", "peak_mb", "total_mb",
              "resident_mb"]  # fmt: skip
    parts = {**found, "costs": table[chosen]}
    return "\n\n".join(
        f"{name}\n{part.to_string(index=False, float_format='{:.3g}'.format)}"
        for name, part in parts.items()
        if len(part)
    )
