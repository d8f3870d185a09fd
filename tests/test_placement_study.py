"""What notebook 09 makes of its runs, and the settings it reads."""

from pathlib import Path

import pytest
from invented_scaling import write_placement
from test_rank_study import LAYERS, Run, column

from vqlora.config import RunSettings
from vqlora.experiments import PlacementSettings, ScalingSettings, load_profile
from vqlora.report.placement_tables import PLACEMENT_TABLES
from vqlora.studies import placement_study

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"vision": ["vision"], "text": ["text"]}
ARMS = [{"label": label, "arm": "vqlora", "bits": "nf4", "learning_rate": 1e-2,
         "overrides": {"rank": 4, "alpha": 8, **({"modalities": PARTS[label]} if label in PARTS else {})}}
        for label in ("rank-4", "rank-64", *PARTS)]  # fmt: skip
SHAPE = {"domains": ["language", "visual"], "seeds": [0, 1], "steps": 4, "train_clips": 90, "eval_clips": 9}
NLL = {
    "language": {"rank-4": 1.0, "rank-16": 0.9, "rank-64": 1.02, "vision": 1.3, "fusion": 1.1, "text": 0.98},
    "visual": {"rank-4": 0.7, "rank-16": 0.7, "rank-64": 0.9, "vision": 0.71, "fusion": 0.7, "text": 0.8},
}


def placement(**more) -> PlacementSettings:
    return PlacementSettings(**{"budget": 102_144, "arms": ARMS, **SHAPE, **more})


def run(label, domain, nll, seed, learning_rate=1e-2) -> Run:
    part = label in placement_study.PARTS
    budget = {"ranks": "uniform", "budget": 900} if part else {}
    settings = RunSettings(
        experiment="09", label=label, arm="vqlora", bits="nf4", domain=domain, seed=seed, steps=4,
        learning_rate=learning_rate, train_clips=9, eval_clips=30, **budget,
    )  # fmt: skip
    ranks = {"vision": (5, 0, 0), "fusion": (0, 40, 0), "text": (0, 0, 7)}.get(label)
    given = {f"rank.{n}": float(r) for n, r in zip(LAYERS, ranks, strict=True) if r} if ranks else {}
    return Run(label, settings, {"nll": nll, **given}, {"trainable_parameters": 880.0}, {}, None)


RUNS = [run(arm, domain, nll, seed) for domain, arms in NLL.items() for arm, nll in arms.items()
        for seed in (0, 1, 2)]  # fmt: skip


def test_a_part_alone_spends_the_budget_and_a_rank_says_its_own_size():
    runs = {one.method: one for one in placement().runs()}
    assert runs["rank-64"].budget is None and runs["rank-64"].ranks is None
    text = runs["text"]
    assert (text.ranks, text.budget, text.modalities) == ("uniform", 102_144, ("text",))
    assert text.alpha / text.rank == runs["rank-4"].alpha / runs["rank-4"].rank


def test_claims_depend_on_what_has_shifted():
    names = ["rank-4", "rank-64", "vision", "text"]
    pairs = {domain: [(c["a"], c["b"]) for c in placement_study.planned(domain, 0.05, names)["primary"]]
             for domain in ("language", "visual", "bursts")}  # fmt: skip
    assert pairs["language"] == [("rank-64", "rank-4"), ("text", "rank-4"), ("rank-4", "vision")]
    assert pairs["visual"] == [("rank-64", "rank-4"), ("vision", "rank-4"), ("rank-4", "text")]
    assert pairs["bursts"] == [("rank-64", "rank-4")]
    few = placement_study.planned("visual", 0.05, ["rank-4", "text"])
    assert [(c["a"], c["b"]) for c in few["primary"]] == [("rank-4", "text")] and few["beside"] == []


def test_verdicts_and_their_correction_within_a_family():
    tests = placement_study.judge(RUNS, 0.05, values=column)
    assert not tests.duplicated(["domain", "comparison"]).any(), "a key of the paper names one test"
    assert tests["family"].value_counts().to_dict() == {"primary": 6, "beside": 4}
    verdicts = tests.set_index(["domain", "comparison"])["verdict"]
    assert verdicts["language", "rank-64_vs_rank-4"] == "supported", "worse, by less than the margin"
    assert verdicts["visual", "rank-64_vs_rank-4"] == "denied"
    assert verdicts["language", "text_vs_rank-4"] == verdicts["visual", "vision_vs_rank-4"] == "supported"
    assert verdicts["language", "rank-4_vs_vision"] == verdicts["visual", "rank-4_vs_text"] == "supported"
    assert verdicts["visual", "rank-4_vs_fusion"] == "denied", "a gain below the margin"
    primary = tests[tests["family"] == "primary"]
    assert (primary["p_holm"] >= primary["p"]).all()
    assert primary["p_holm"].min() == pytest.approx(min(1, 6 * primary["p"].min()))
    alone = [one for one in RUNS if one.settings.method == "text"]
    with pytest.raises(ValueError, match="no two arms"):
        placement_study.judge(alone, 0.05, values=column)


def test_what_the_budget_bought_is_counted_by_arm():
    sizes = placement_study.sizes(RUNS).set_index("arm")
    assert sizes["modality"].to_dict() == {"vision": "vision", "fusion": "fusion", "text": "text"}
    assert sizes.loc["fusion", ["layers", "rank_low", "rank_high"]].tolist() == [1, 40, 40]
    assert set(sizes["trainable_parameters"]) == {880}


def test_tables_show_arms_and_claims(tmp_path):
    write_placement(tmp_path / "09_rank_size_and_placement")
    text = {name: build(tmp_path).markdown() for name, build in PLACEMENT_TABLES.items()}
    assert "| Vision alone | 1.400 [1.370, 1.430] |" in text["placement"] and "| 11-12 |" in text["placement"]
    assert "Rank 64, all parts is no worse than rank 4, all parts" in text["placement_tests"]
    rows = text["placement_tests"].splitlines()
    further = [line for line in rows if "Rank 16, all parts beats" in line]
    assert [line.split("|")[1].strip() for line in further] == ["Language shift", "Visual shift"]
    assert sum("fusion alone" in line for line in rows) == 1


def test_fewer_clips_are_those_of_one_arm_with_the_same_steps():
    scaling = ScalingSettings(clips=[10, 30])
    runs = scaling.clip_runs(placement())
    assert {(one.method, one.steps) for one in runs} == {("rank-4", 4)}
    assert sorted({one.train_clips for one in runs}) == [10, 30] and len(runs) == 8
    with pytest.raises(ValueError, match="clips: 90; allowed: fewer than"):
        ScalingSettings(clips=[90]).clip_runs(placement())
    with pytest.raises(ValueError, match="arm: 'rank-8' is no arm of placement; allowed: rank-4, rank-64"):
        ScalingSettings(arm="rank-8", clips=[10]).clip_runs(placement())
    with pytest.raises(ValueError, match="clips: 10 given twice"):
        ScalingSettings(clips=[10, 10])


@pytest.mark.parametrize("name", ["smoke", "cpu", "full"])
def test_profiles_have_the_arm_that_parts_are_compared_with(name):
    profile = load_profile(name, ROOT)
    runs = profile.placement.runs()
    assert {placement_study.ALL, "text"} <= {one.method for one in runs}
    assert {one.alpha / one.rank for one in runs} == {2.0} and {one.gate for one in runs} == {"none"}
    assert {one.budget for one in runs} <= {None, profile.placement.budget}
    assert profile.scaling.arm == placement_study.ALL
    assert not {one.seed for one in profile.placement.sweep_runs()} & {one.seed for one in runs}
    swept = [arm.sweep for arm in profile.placement.arms]
    assert all(swept) or not any(swept), "every arm has its own rate, or all take the committed ones"
