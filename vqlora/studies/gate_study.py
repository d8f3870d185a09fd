"""What notebook 05 asks of its runs: rates of gates, planned claims, and what the gates do in which frames.

    rates = settle(temporal, sweep, own, committed)     # arm, bits, learning_rate, gate_rate, origin
    runs = run_grid(rated(temporal.runs(), rates), here.store, here.profile, execute=gate_runs.execute)
    tests = judge(temporal, runs)                       # domain, comparison, .., verdict, family
    seen = frames_of(runs, here.data)                   # a row for each run and test frame: gates and truth
    by_layer(seen)                                      # domain, arm, layer: its gate, and what that follows
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from vqlora import comparison
from vqlora.config import RunSettings, arm_name
from vqlora.experiments import TemporalSettings
from vqlora.store import StoredRun, write_csv
from vqlora.studies.rank_study import part_of

PRIMARY = ("plain", "constant", "shuffled")  # what the gate has to beat
BESIDE = (  # further pairs, where both were run
    ("constant", "plain"), ("shuffled", "plain"), ("mixture", "plain"), ("mixture", "rank"),
    ("segments", "plain"), ("segments", "rank"), ("rank+segments", "plain"), ("rank+segments", "rank"),
    ("rank+segments", "segments"), ("mixture", "mixture-constant"), ("mixture", "mixture-shuffled"),
    ("rank", "random"), ("rank-vision", "plain"), ("rank-text", "plain"), ("rank", "rank-vision"),
    ("rank", "rank-text"),
)  # fmt: skip
RATES = ["arm", "bits", "learning_rate", "gate_rate"]
MEASURED = ("feature.", "gate.", "active.")  # columns of `vqlora.gate_runs`
LAYER = ["domain", "arm", "seed", "layer", "modality"]


# -- rates


def chosen_rates(sweep: Sequence[StoredRun], metric: str = "nll") -> pd.DataFrame:
    """The rates of each arm with the lowest mean loss over domains and seeds of a sweep: RATES, value."""
    means = _rates_and(sweep, metric).groupby(RATES, as_index=False, dropna=False)["value"].mean()
    return means.loc[means.groupby(["arm", "bits"])["value"].idxmin()].reset_index(drop=True)


def settle(
    temporal: TemporalSettings, sweep: Sequence[StoredRun], own: Path, committed: Path
) -> pd.DataFrame:
    """Rates of every arm: from this profile's sweep, else the committed one, else the profile: RATES, origin.

    An arm that was not swept (a control, another kind of gate, other frames) takes those of the first one
    that was and has the same gate, or else some gate as well. The result of a sweep is written to ``own``.
    """
    own.unlink(missing_ok=True)
    if sweep:
        write_csv(own, chosen_rates(sweep))
    path = next((path for path in (own, committed) if path.is_file()), None)
    found = pd.read_csv(path).to_dict("records") if path else []
    known = {arm_name(row["arm"], row["bits"]): row for row in found}
    swept, rows = [arm for arm in temporal.arms if arm.name in known], []
    for arm in temporal.arms:
        gate = arm.overrides.get("gate")
        alike = [one for one in swept if (one.overrides.get("gate") == "none") == (gate == "none")]
        same = [one for one in alike if one.overrides.get("gate") == gate]
        like = next(iter([one for one in swept if one == arm] + same + alike), None)
        if like is None:
            rate = None if gate == "none" else arm.overrides.get("gate_rate")
            rows.append((arm.label, arm.bits, arm.learning_rate, rate, "profile"))
            continue
        values, origin = known[like.name], "sweep" if path == own else "committed sweep"
        origin += "" if like == arm else f" of {like.label}"
        rows.append((arm.label, arm.bits, values["learning_rate"], values["gate_rate"], origin))
    return pd.DataFrame(rows, columns=[*RATES, "origin"]).astype({"gate_rate": float})


def rated(runs: Iterable[RunSettings], rates: pd.DataFrame) -> tuple[RunSettings, ...]:
    """The runs with the rates of their arms."""
    known = rates.set_index(["arm", "bits"])
    made = []
    for run in runs:
        row = known.loc[(run.method, run.bits)]
        gate_rate = {} if pd.isna(row["gate_rate"]) else {"gate_rate": float(row["gate_rate"])}
        made.append(run.model_copy(update={"learning_rate": float(row["learning_rate"]), **gate_rate}))
    return tuple(made)


def sweep_table(
    sweep: Sequence[StoredRun], rates: pd.DataFrame, committed: Path, metric: str = "nll"
) -> pd.DataFrame:
    """Every swept pair of rates with its loss: domain, arm, learning_rate, gate_rate, metric, value, chosen.

    Without a sweep in this profile, the committed table; without that, an empty one.
    """
    columns = ["domain", "arm", "learning_rate", "gate_rate", "metric", "value"]
    if sweep:
        tried = _rates_and(sweep, metric).groupby(["domain", *RATES], as_index=False, dropna=False)
        table = tried["value"].mean().assign(metric=metric)[columns]
    else:
        table = pd.read_csv(committed)[columns] if committed.is_file() else pd.DataFrame(columns=columns)
    used = {(row.arm, f"{row.learning_rate:g}", f"{row.gate_rate:g}") for row in rates.itertuples()}
    pairs = zip(table["arm"], table["learning_rate"], table["gate_rate"], strict=True)
    return table.assign(chosen=[(arm, f"{rate:g}", f"{gate:g}") in used for arm, rate, gate in pairs])


def _rates_and(sweep: Sequence[StoredRun], metric: str) -> pd.DataFrame:
    rows = [(run.settings.domain, run.settings.method, run.settings.bits, run.settings.learning_rate,
             run.settings.gate_rate if run.settings.gate != "none" else None, run.metrics[metric])
            for run in sweep]  # fmt: skip
    return pd.DataFrame(rows, columns=["domain", *RATES, "value"]).astype({"gate_rate": float})


# -- claims


def primary_claims(margin_nll: float) -> list[dict]:
    """The primary comparisons, per domain, on NLL; written down before any run. A gain that is temporal beats
    plain adapters, a gate that is the same for all frames, and one that reads other frames' features.

    Denied is a claim whose interval lies below the margin: whatever gain there is does not matter.
    """
    return [{"a": "rank", "b": other, "claim": "greater", "margin": margin_nll} for other in PRIMARY]


def judge(
    temporal: TemporalSettings, runs: Sequence[StoredRun], *, values: Callable | None = None
) -> pd.DataFrame:
    """Tests as `comparison.judge` makes them, with their family: Holm's correction is within a family.

    primary: `primary_claims` on the main domains. arms: the pairs of BESIDE there. domains: the gate against
    plain adapters on the further domains. beyond: against its controls there, those that were run.
    """
    margin, parts = temporal.margin_nll, []
    labels = {arm.label for arm in temporal.arms}
    beside = [{"a": a, "b": b, "claim": "greater", "margin": margin} for a, b in BESIDE if {a, b} <= labels]
    first = primary_claims(margin)
    controls = [claim for claim in first[1:] if claim["b"] in temporal.fewer]
    families = (("primary", temporal.domains, first), ("arms", temporal.domains, beside),
                ("domains", temporal.more_domains, first[:1]), ("beyond", temporal.more_domains, controls))
    for family, domains, claims in families:
        own = [run for run in runs if run.settings.domain in domains]
        if own and claims:
            parts.append(comparison.judge(own, claims, values=values).assign(family=family))
    return pd.concat(parts, ignore_index=True)


def overall(tests: pd.DataFrame) -> pd.DataFrame:
    """How the verdicts fell, by comparison over its domains (of, metric, value): how many domains, on which
    each verdict, largest and smallest gain. Of "primary": all these claims together. Of "temporal": the main
    domains on which every primary claim is supported; of "further": the other domains on which the same ones
    were put, likewise.
    """
    primary, rows = tests[tests["family"] == "primary"], []
    beyond = tests[tests["family"].isin(["domains", "beyond"])]
    beyond = beyond[beyond.groupby("domain")["comparison"].transform("nunique") == len(PRIMARY)]
    for name, own in (("temporal", primary), ("further", beyond)):
        held = (own["verdict"] == "supported").groupby(own["domain"], sort=False).all()
        rows += [(name, "claims_count", str(len(held))), *_named(name, "supported", held.index[held])]
    for name, own in [("primary", primary), *tests.groupby("comparison", sort=False)]:
        rows.append((name, "claims_count", str(len(own))))
        for verdict in ("supported", "denied", "undecided"):
            rows += _named(name, verdict, own.loc[own["verdict"] == verdict, "domain"])
        for which, row in (("largest", own["value"].idxmax()), ("smallest", own["value"].idxmin())):
            rows += [(name, f"{which}_nll", f"{own.loc[row, 'value']:.8g}")]
            rows += [(name, f"{which}_name", own.loc[row, "domain"])]
    return pd.DataFrame(rows, columns=["of", "metric", "value"])


def _named(of: str, verdict: str, domains: Iterable[str]) -> list[tuple[str, str, str]]:
    domains = list(domains)
    names = ", ".join(dict.fromkeys(domains)) or "none"
    return [(of, f"{verdict}_count", str(len(domains))), (of, f"{verdict}_names", names)]


# -- gates


def frames_of(runs: Sequence[StoredRun], data_root: Path) -> pd.DataFrame:
    """What the gates did in every test frame: domain, arm, seed, clip, frame, moving, odd, feature.*, gate.*,
    active.* (see `vqlora.gate_runs`), a row for each gated run and frame.

    moving: a told event is under way. odd: spliced in from another clip, or degraded.
    """
    parts = []
    for run in runs:
        if run.settings.gate == "none":
            continue
        rows = run.examples()
        kept = [name for name in rows if name in ("clip", "frame") or name.startswith(MEASURED)]
        rows = rows.loc[rows["task"] == "gate", kept]
        named = {"domain": run.settings.domain, "arm": run.settings.method, "seed": run.settings.seed}
        parts.append(rows.assign(**named))
    seen = pd.concat(parts, ignore_index=True).astype({"frame": int})
    happens = [_happening(Path(data_root), domain) for domain in dict.fromkeys(seen["domain"])]
    seen = seen.merge(pd.concat(happens), on=["clip", "frame"], how="left", validate="many_to_one")
    if seen["moving"].isna().any():
        lost = seen.loc[seen["moving"].isna(), "clip"].iloc[0]
        raise ValueError(f"{data_root}: no truth for clip {lost!r}")
    return seen.astype({"moving": bool, "odd": bool})


def _happening(data_root: Path, domain: str) -> pd.DataFrame:
    """clip, frame, moving, odd for every frame of a rendered domain."""
    rows = []
    for line in (data_root / domain / "annotations" / "truth.jsonl").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        moving = {t for e in told["events"] if e["motion"] != "aside" for t in range(e["start"], e["end"])}
        odd = {*told["inserted"], *told["degraded"]}
        rows += [(told["video_id"], t, t in moving, t in odd) for t in range(told["frames"])]
    return pd.DataFrame(rows, columns=["clip", "frame", "moving", "odd"])


def by_layer(seen: pd.DataFrame) -> pd.DataFrame:
    """The gate of each layer over all test frames: LAYER, place, gate_mean, gate_sd, active_mean,
    motion_corr, moving_gap, odd_gap.

    active_mean: effective rank. motion_corr: with the measured motion of the frame. moving_gap, odd_gap: mean
    gate of frames in which something moves (that are odd) less that of the others; empty without such frames.
    """
    layers = [name.removeprefix("gate.") for name in seen if name.startswith("gate.")]
    rows = []
    for named, own in seen.groupby(["domain", "arm", "seed"]):
        for place, layer in enumerate(layers):
            gate = own[f"gate.{layer}"]
            if gate.isna().all():  # a part without gates
                continue
            follows = gate.corr(own["feature.motion"]) if gate.std() > 1e-6 else 0.0
            gaps = (gate[own[what]].mean() - gate[~own[what]].mean() for what in ("moving", "odd"))
            rows.append((*named, layer, part_of(layer), place, gate.mean(), gate.std(),
                         own[f"active.{layer}"].mean(), follows, *gaps))  # fmt: skip
    measured = ["place", "gate_mean", "gate_sd", "active_mean", "motion_corr", "moving_gap", "odd_gap"]
    return pd.DataFrame(rows, columns=[*LAYER, *measured])


def by_part(layers: pd.DataFrame) -> pd.DataFrame:
    """`by_layer` as means over the layers of a part and over seeds."""
    measured = [name for name in layers if name not in (*LAYER, "place")]
    return layers.groupby(["domain", "arm", "modality"], as_index=False)[measured].mean()


def curves(seen: pd.DataFrame, data_root: Path, arm: str = "rank", clips: int = 2) -> pd.DataFrame:
    """Gates in the first test clips of each domain, first seed: domain, clip, frame, moving, odd, motion, and
    a column for each part of the model, the mean over its layers. A row for each frame of the clips; motion
    and gates are empty where the model was not shown the frame.
    """
    own = seen[(seen["arm"] == arm) & (seen["seed"] == seen["seed"].min())]
    first = own.drop_duplicates("clip").groupby("domain").head(clips)
    parts: dict[str, list[str]] = {}
    for name in own:
        if name.startswith("gate."):
            parts.setdefault(part_of(name), []).append(name)
    means = {part: own[names].mean(axis=1) for part, names in parts.items()}
    shown = own[["clip", "frame"]].assign(motion=own["feature.motion"], **means)
    happens = pd.concat([_happening(Path(data_root), domain) for domain in first["domain"].unique()])
    happens = first[["domain", "clip"]].merge(happens, on="clip")
    return happens.merge(shown, on=["clip", "frame"], how="left")
