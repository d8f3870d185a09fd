"""What measured steps say: costs of every arm, ratios within rounds, how costs grow, keyed numbers.

>>> table = costs(steps, times)                         # doctest: +SKIP
>>> ratios(table, times), growth(table, "frames")       # doctest: +SKIP

`steps` has a row for every result of `measure_arm`, `times` one for every row of `measure_rounds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from vqlora.experiments import CostModel

SETTING = ["model", "frames", "rank", "batch"]
GROWING = ("cpu_s", "peak_bytes", "total_bytes", "flops")


def costs(steps: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """One row a setting and arm: bytes and FLOPs, and medians over rounds of seconds, tokens a second.

    CPU seconds are those of the process, so that other load on the machine matters less; wall seconds stand
    beside them.
    """
    clocked = times.groupby([*SETTING, "arm"], sort=False)[["cpu_s", "wall_s"]].median().reset_index()
    table = steps.merge(clocked, "left", on=[*SETTING, "arm"])
    return table.assign(tokens_per_s=table["tokens"] / table["cpu_s"])


def ratios(
    steps: pd.DataFrame, times: pd.DataFrame, against: Iterable[str] = ("qlora", "lora", "full")
) -> pd.DataFrame:
    """Each arm over others: setting, arm, against, what, median, low, high, rounds.

    Seconds are paired by round; low and high hold the median with 95%, whatever the distribution (order
    statistics), and are the extremes where five rounds or fewer can give none. Bytes and FLOPs are the same
    in all rounds.
    """
    once = ("peak_bytes", "total_bytes", "static_bytes", "resident_bytes", "flops")
    found = []
    for setting, group in steps.groupby(SETTING, sort=False):
        arms = group.set_index("arm")
        rounds = times[(times[SETTING] == list(setting)).all(axis=1)]
        seconds = rounds.pivot(index="round", columns="arm", values="cpu_s")
        for below in [arm for arm in against if arm in arms.index]:
            for above in arms.index.drop(below):
                pairs = {"cpu_s": (seconds[above] / seconds[below]).dropna() if len(seconds) else []}
                pairs |= {what: [arms.loc[above, what] / arms.loc[below, what]] for what in once}
                for what, values in pairs.items():
                    if len(values):
                        low, high = _around_median(values)
                        row = {"arm": above, "against": below, "what": what, "median": np.median(values),
                               "low": low, "high": high, "rounds": len(values)}  # fmt: skip
                        found.append({**dict(zip(SETTING, setting, strict=True)), **row})
    return pd.DataFrame(found)


def _around_median(values: Sequence[float]) -> tuple[float, float]:
    """The exact 95% interval of the median by order statistics; the extremes where there is none."""
    found = stats.quantile_test(values, q=np.median(values), p=0.5).confidence_interval(0.95)
    return (found.low, found.high) if np.isfinite(found.low) else (min(values), max(values))


def growth(table: pd.DataFrame, along: str) -> pd.DataFrame:
    """How costs grow along "frames" or "rank": fits by least squares, where there are three points or more.

    Returns model, arm, what, and of y = fixed + each · x: fixed, each with its 95% interval (each_low,
    each_high), r2; of y = c · x^exponent: exponent, exponent_low, exponent_high, r2_log; points. Intervals
    are those of the fit, by t; memory is no sample: there they tell how straight the line is.
    Raises KeyError for another `along`.
    """
    if along not in ("frames", "rank"):
        raise KeyError(f"along: {along!r}; allowed: frames, rank")
    rest = [name for name in (*SETTING, "arm") if name != along]
    found = []
    for setting, group in table.groupby(rest, sort=False):
        x = group[along].to_numpy(float)
        for what in GROWING:
            y = group[what].to_numpy(float)
            if len(set(x)) < 3 or not np.isfinite(y).all():
                continue
            line, power = stats.linregress(x, y), stats.linregress(np.log(x), np.log(y))
            t = stats.t.isf(0.025, len(x) - 2)
            named = dict(zip(rest, setting, strict=True))
            found.append({
                "model": named["model"], "arm": named["arm"], "what": what, "fixed": line.intercept,
                "each": line.slope, "each_low": line.slope - t * line.stderr,
                "each_high": line.slope + t * line.stderr, "r2": line.rvalue**2, "exponent": power.slope,
                "exponent_low": power.slope - t * power.stderr,
                "exponent_high": power.slope + t * power.stderr, "r2_log": power.rvalue**2,
                "points": len(x),
            })  # fmt: skip
    return pd.DataFrame(found, columns=list(found[0]) if found else ["model", "arm", "what"])


def cost_summary(
    main: CostModel, table: pd.DataFrame, ratios: pd.DataFrame, grown: pd.DataFrame, answers: pd.DataFrame
) -> pd.DataFrame:
    """Keyed numbers: domain, arm, metric, value, low, high. Domain `main` has the main model at its own
    setting, ratios to plain QLoRA and to full fine-tuning; `growth` the first model's fits along frames
    (`grown`); `answers` the main model's."""
    here, compared = (_at(frame, main) for frame in (table, ratios))
    said = {"model": main.model, "frames": main.at, "rank": main.rank, "clips": main.batch,
            "tokens_count": here["tokens"].iloc[0], "rounds_count": compared["rounds"].max()}  # fmt: skip
    rows = [("main", "all", metric, value, None, None) for metric, value in said.items()]
    told = {name: name for name in ("cpu_s", "static_bytes", "peak_bytes", "total_bytes", "resident_bytes")}
    told |= {"flops": "step_flops", "tokens_per_s": "tokens_per_second"}
    for row in here.to_dict("records"):
        rows += [("main", row["arm"], metric, row[name], None, None) for name, metric in told.items()]
    for row in compared[compared["against"].isin(["qlora", "full"])].itertuples(index=False):
        what = row.what.removesuffix("_bytes").removesuffix("_s")
        rows.append(("main", row.arm, f"{what}_to_{row.against}", row.median, row.low, row.high))
    for row in grown[grown["model"] == table["model"].iloc[0]].itertuples(index=False):
        if row.what in ("peak_bytes", "cpu_s"):
            each = row.each, row.each_low, row.each_high
            rows.append(("growth", row.arm, f"each_frame_{row.what}", *each))
            power = row.exponent, row.exponent_low, row.exponent_high
            rows.append(("growth", row.arm, f"exponent_{row.what.split('_')[0]}", *power))
    for row in answers[answers["model"] == main.model].to_dict("records"):
        way = f"{row['bits']}{'-merged' if row['merged'] else ''}"
        rows += [("answers", way, name, row[name], None, None)
                 for name in ("first_token_s", "next_token_s", "static_bytes", "total_bytes")]  # fmt: skip
    return pd.DataFrame(rows, columns=["domain", "arm", "metric", "value", "low", "high"]).astype(
        {"value": object}
    )


def _at(frame: pd.DataFrame, model: CostModel) -> pd.DataFrame:
    """The rows at the setting where the model's aims are read."""
    setting = {"model": model.model, "frames": model.at, "rank": model.rank, "batch": model.batch}
    return frame[(frame[list(setting)] == list(setting.values())).all(axis=1)]


def show(found: Mapping[str, pd.DataFrame]) -> str:
    """Tables as text, in MB (10^6 bytes) where they are costs."""
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
