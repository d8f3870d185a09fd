"""What notebook 06 asks of its runs: which ranks each method chose, who wins where, what it can lose.

    keep_reference(here.base, here.data)          # source gradients beside the base, once for its weights
    layers = ranks_of(runs)                       # domain, arm, seed, layer, modality, rank
    regret(summary)                               # arm, worst gap to the best method over the domains
    by_budget({102144: summary, 51072: other})    # budget, domain, arm: nll, its gap to the best method
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from vqlora import comparison, stats
from vqlora.experiments import RankSettings
from vqlora.store import StoredRun

FIXED = ("vision-heavy", "text-heavy")
SOURCE_BATCHES, BATCH = 16, 32


def rank_claims(
    margin_nll: float, proposed: str = "relative", methods: Sequence[str] | None = None
) -> list[dict]:
    """The primary comparisons, per domain, on NLL; written down before any run. `methods`: all there are in a
    smaller profile, which then makes only the claims about these.

    A method that is no worse than either fixed split on every domain needs nobody to know the kind of shift.
    """
    no_worse = [{"a": proposed, "b": split, "claim": "no_worse", "margin": margin_nll} for split in FIXED]
    claims = [{"a": proposed, "b": "uniform", "claim": "greater"}, *no_worse]
    return [claim for claim in claims if methods is None or claim["b"] in methods]


def further_claims(methods: Sequence[str]) -> list[dict]:
    """Comparisons beside the planned ones, on NLL, a family of their own: does the source gradient matter, is
    a layer that lost more to quantization worth more rank, are the published rivals beaten?"""
    pairs = [("relative", "gradient"), ("gradient+quantization", "gradient"),
             ("relative", "eva"), ("relative", "adalora")]  # fmt: skip
    return [{"a": a, "b": b, "claim": "greater"} for a, b in pairs if {a, b} <= set(methods)]


def ranks_of(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """The rank of every layer at the end of every run: domain, arm, seed, place, layer, modality, rank.

    place: number of the layer in the model's order, as far as one run has them all; others come behind.
    """
    found = {id(run): _ranks(run) for run in runs}
    longest_first = sorted(found.values(), key=len, reverse=True)
    order, rows = list(dict.fromkeys(layer for own in longest_first for layer in own)), []
    for run in runs:
        named = (run.settings.domain, run.settings.method, run.settings.seed)
        own = found[id(run)]
        rows += [(*named, i, layer, part_of(layer), own.get(layer, 0)) for i, layer in enumerate(order)]
    return pd.DataFrame(rows, columns=["domain", "arm", "seed", "place", "layer", "modality", "rank"])


def _ranks(run: StoredRun) -> dict[str, int]:
    """Ranks by layer; a layer that a method took off is not among them."""
    return {key[5:]: int(value) for key, value in run.metrics.items() if key.startswith("rank.")}


def shares(layers: pd.DataFrame) -> pd.DataFrame:
    """Of all ranks, the share in each modality, mean over seeds: domain, arm and a column a modality."""
    totals = layers.groupby(["domain", "arm", "modality"])["rank"].sum().unstack(fill_value=0)
    return totals.div(totals.sum(axis=1), axis=0).reset_index()


def spread_over_seeds(layers: pd.DataFrame) -> pd.DataFrame:
    """How much of its ranks a method moves from seed to seed: domain, arm, moved_frac.

    Half the mean absolute difference of two seeds' ranks, over their total; 0 for fixed ranks.
    """
    rows = []
    for (domain, arm), own in layers.groupby(["domain", "arm"]):
        wide = own.pivot(index="layer", columns="seed", values="rank").to_numpy()
        pairs = [(i, j) for j in range(wide.shape[1]) for i in range(j)]
        moved = [abs(wide[:, i] - wide[:, j]).sum() / wide[:, [i, j]].sum() for i, j in pairs]
        rows.append((domain, arm, sum(moved) / len(moved) if moved else 0.0))
    return pd.DataFrame(rows, columns=["domain", "arm", "moved_frac"])


def regret(summary: pd.DataFrame, metric: str = "nll") -> pd.DataFrame:
    """How far each method is from the best one of each domain: arm, a column a domain, worst; best first."""
    wide = summary[summary["metric"] == metric].pivot(index="arm", columns="domain", values="value")
    gaps = wide - wide.min()
    return gaps.assign(worst=gaps.max(axis=1)).sort_values("worst").reset_index()


def by_budget(summaries: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """Methods that were run at every budget, NLL and its gap to the best one of a domain and budget: budget,
    domain, arm, metric (nll, gap_nll), value, low, high. Domain "worst" has a method's largest gap.
    """
    asked = (summary.loc[summary["metric"] == "nll"] for summary in summaries.values())
    nll = pd.concat(asked, keys=summaries, names=["budget"]).reset_index("budget").reset_index(drop=True)
    everywhere = nll.groupby("arm")["budget"].transform("nunique") == len(summaries)
    nll = nll[everywhere]
    gaps = nll.assign(metric="gap_nll", low=math.nan, high=math.nan)
    gaps["value"] -= nll.groupby(["budget", "domain"])["value"].transform("min")
    worst = gaps.loc[gaps.groupby(["budget", "arm"])["value"].idxmax()].assign(domain="worst")
    columns = ["budget", "domain", "arm", "metric", "value", "low", "high"]
    return pd.concat([nll, gaps, worst], ignore_index=True)[columns].sort_values(columns[:4])


def over_budgets(budgets: pd.DataFrame, tests: pd.DataFrame | None = None) -> pd.DataFrame:
    """What `by_budget` and `judge_budgets` come to: of, metric, value.

    Of each method its largest gap at any budget (gap_nll); of "all" how many budgets there are, the method
    whose largest gap is smallest (best_name, best_nll), and at how many budgets the worst gap of "relative"
    is the smallest (first_count); of "further" how many claims at the other budgets have each verdict.
    """
    worst = budgets[budgets["domain"] == "worst"].pivot(index="arm", columns="budget", values="value")
    largest = worst.max(axis=1).sort_values()
    rows = [(arm, "gap_nll", f"{gap:.8g}") for arm, gap in largest.items()]
    first = int((worst.idxmin() == "relative").sum())
    rows += [("all", "budgets_count", str(worst.shape[1])), ("all", "best_name", largest.index[0]),
             ("all", "best_nll", f"{largest.iloc[0]:.8g}"), ("all", "first_count", str(first))]  # fmt: skip
    rows.append(("further", "claims_count", str(0 if tests is None else len(tests))))
    for verdict in ("supported", "denied", "undecided"):
        count = 0 if tests is None else int((tests["verdict"] == verdict).sum())
        rows.append(("further", f"{verdict}_count", str(count)))
    return pd.DataFrame(rows, columns=["of", "metric", "value"])


_RATES = ["budget", "domain", "arm", "bits", "learning_rate", "metric", "value", "chosen"]


def tuned(there: RankSettings, sweep: Sequence[StoredRun], committed: Path) -> pd.DataFrame:
    """Learning rates of the methods at another budget, by validation NLL: budget, domain, arm, bits,
    learning_rate, metric, value, chosen (the lowest of a method on a domain).

    From this profile's sweep there (`RankSettings.at`), else from the committed table of this form; where a
    domain and method are in neither it is the rate of the profile, with no loss.
    """
    rows = [(run.settings.domain, run.settings.method, run.settings.learning_rate, run.metrics["nll"])
            for run in sweep]  # fmt: skip
    table = pd.DataFrame(rows, columns=["domain", "arm", "learning_rate", "value"])
    table = table.groupby(["domain", "arm", "learning_rate"], as_index=False)["value"].mean()
    if sweep:
        table["chosen"] = table["value"] == table.groupby(["domain", "arm"])["value"].transform("min")
    elif committed.is_file():
        kept = pd.read_csv(committed)
        table = kept[kept["budget"] == there.budget].reindex(columns=[*table, "chosen"])
    arms = {arm.label or arm.arm: arm for arm in there.arms}
    table = table[table["arm"].isin(arms)]
    found = set(zip(table["domain"], table["arm"], strict=True))
    lacking = [{"domain": domain, "arm": name, "learning_rate": arm.learning_rate, "value": math.nan,
                "chosen": True} for domain in there.domains for name, arm in arms.items()
               if (domain, name) not in found]  # fmt: skip
    table = pd.concat([part for part in (table, pd.DataFrame(lacking)) if len(part)], ignore_index=True)
    told = table.assign(budget=there.budget, bits=[arms[name].bits for name in table["arm"]], metric="nll")
    return told.astype({"chosen": bool})[_RATES]


def table_of_rates(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """What `tuned` has for each budget, in one table; its columns alone where there is no other budget."""
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_RATES)


def judge_budgets(
    runs: Mapping[int, Sequence[StoredRun]], margin_nll: float, values: Callable | None = None
) -> pd.DataFrame:
    """`rank_claims` at each of these budgets: `comparison.judge` with `budget` before; Holm over all."""
    parts = []
    for budget, own in runs.items():
        claims = rank_claims(margin_nll, methods=sorted({run.settings.method for run in own}))
        parts.append(comparison.judge(own, claims, values=values).assign(budget=budget))
    table = stats.corrected(pd.concat(parts, ignore_index=True))
    return table[["budget", *(name for name in table if name != "budget")]]


def calibration(cost: pd.DataFrame) -> pd.DataFrame:
    """What choosing the ranks costs before training, mean over runs: arm, metric, value.

    calibration_cpu_s: attaching the adapter, ranks read off the batches included; calibration_frac: of all
    CPU time up to the trained adapter. Ranks that move while training cost nothing here and some there.
    """
    spent = cost.groupby("arm")[["attach_cpu_s", "train_cpu_s"]].mean()
    share = spent["attach_cpu_s"] / spent.sum(axis=1)
    table = pd.DataFrame({"calibration_cpu_s": spent["attach_cpu_s"], "calibration_frac": share})
    long = table.rename_axis("arm").reset_index().melt("arm", var_name="metric")
    return long.sort_values(["arm", "metric"])


def runs_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs' results without a column for each layer's rank, which `ranks_of` has."""
    return frame[[column for column in frame.columns if not column.startswith("rank.")]]


def keep_reference(base: str, data_root: str | Path) -> Path:
    """Measure the base's source gradients and keep them beside its weights, unless they are there.

    On the source domain's validation clips: the base's own distribution, and no clip of a target.
    base: `released` or a folder. Returns the file; ranks "relative" find it by themselves.
    """
    import torch

    from vqlora.base import RELEASED, load_base
    from vqlora.data.batches import ClipDataset, Collator
    from vqlora.data.cache import FrameStore
    from vqlora.data.formats import load_kinemoji
    from vqlora.losses import batch_loss
    from vqlora.quantize import load_quantized
    from vqlora.ranks.allocate import REFERENCE, measure_reference, reference_weights, save_reference
    from vqlora.train import choose_attention

    folder = RELEASED if base == "released" else Path(base)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if reference_weights(folder / REFERENCE) == weights:
        return folder / REFERENCE
    model, tokenizer = load_base(base)
    model = load_quantized(model, "nf4")
    device = next(model.parameters()).device
    choose_attention(model, model.vqlora_precision.compute, device)
    clips = load_kinemoji(Path(data_root), "source", "val").clips
    data = ClipDataset(clips, FrameStore(clips, Path(data_root) / "cache", progress=False), seed=0)
    collator = Collator(tokenizer, seed=0, tokens_per_frame=getattr(model.config, "tokens_per_frame", 4))
    count = min(SOURCE_BATCHES, max(1, len(data) // BATCH))
    numbers = torch.arange(count * BATCH).remainder(len(data)).view(count, BATCH).tolist()
    batches = ({k: v.to(device) for k, v in collator([data[i] for i in row]).items()} for row in numbers)
    found = measure_reference(model, batches, loss=lambda model, batch: batch_loss(model, batch, 0.25)[0])
    save_reference(folder / REFERENCE, found, weights)
    return folder / REFERENCE


def part_of(layer: str) -> str:
    """Vision, fusion or text, by the paths of the embedded base."""
    found = re.search(r"vision_tower|multi_modal_projector|language_model", layer)
    known = {"vision_tower": "vision", "multi_modal_projector": "fusion", "language_model": "text"}
    return known[found.group()] if found else "other"
