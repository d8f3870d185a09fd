"""What notebook 10 makes of finished runs and results: curves, laws, fronts; sizes of the base."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from invented_scaling import write_arms, write_placement, write_scaling
from test_placement_study import placement, run
from test_rank_study import column

from vqlora import base_sizes
from vqlora.experiments import ScalingSettings, load_profile
from vqlora.report.scaling_plots import pareto, scaling_fits
from vqlora.report.scaling_tables import SCALING_TABLES, distinct
from vqlora.studies import scaling_study

ROOT = Path(__file__).resolve().parents[1]
LOSSES = {1: 1.5, 4: 1.125, 16: 1.03125, 64: 1.0078125}


def ranked(nll=LOSSES, seeds=(0, 1, 2)):
    made = [run("rank-4", "visual", loss, seed) for rank, loss in nll.items() for seed in seeds]
    ranks = [rank for rank in nll for _ in seeds]
    return [type(one)(one.key, one.settings.model_copy(update={"rank": rank}), one.metrics, {}, {}, None)
            for one, rank in zip(made, ranks, strict=True)]  # fmt: skip


def rank_of(one) -> int:
    return one.settings.rank


def test_a_curve_has_seeds_and_clips_at_each_size_in_order():
    (curve,) = scaling_study.from_runs("rank", ranked()[::-1], rank_of, values=column)
    assert curve.x.tolist() == [1, 4, 16, 64] and curve.values.shape == (4, 3, 30)
    assert curve.values.mean(axis=(1, 2)) == pytest.approx(list(LOSSES.values()), abs=0.01)
    points = scaling_study.points([curve]).set_index("x")
    assert (points["low"] < points["value"]).all() and points.loc[1, "metric"] == "nll"
    short = [one for one in ranked() if (one.settings.rank, one.settings.seed) != (16, 2)]
    with pytest.raises(ValueError, match="rank 16 on visual: other seeds or clips"):
        scaling_study.from_runs("rank", short, rank_of, values=column)


def test_frames_are_curves_of_the_domains_that_have_all_numbers():
    rows = [(d, k, policy, 1.0 + 1 / k + shift) for d, shift in (("language", 0.0), ("visual", 0.5))
            for k in (1, 2, 4, 8) for policy in ("uniform", "oracle")]  # fmt: skip
    rows.append(("source", 4, "uniform", 0.3))
    table = pd.DataFrame(rows, columns=["domain", "frames", "policy", "nll"])
    (curve,) = scaling_study.from_frames(table)
    assert curve.x.tolist() == [1, 2, 4, 8] and curve.values.shape == (4, 1, 2)
    assert curve.values[:, 0, 0] == pytest.approx([2, 1.5, 1.25, 1.125])


def test_laws_are_told_with_their_state_and_counted():
    curves = scaling_study.from_runs("rank", ranked(), rank_of, values=column)
    curves += [scaling_study.Sizes("clips", "visual", np.array([10.0, 20]), np.ones((2, 3, 4)))]
    fits = scaling_study.fits(curves, resamples=100)
    told = fits.set_index(["axis", "metric"])
    assert set(fits["axis"]) == {"rank"}, "two sizes are not fitted"
    exponent = told.loc[("rank", "exponent")]
    assert exponent["low"] < 1 < exponent["high"] and told.loc[("rank", "state"), "value"] == "determined"
    assert told.loc[("rank", "gain_nll"), "verdict"] == "supported"
    counts = scaling_study.overall(fits).set_index(["of", "metric"])["value"]
    assert counts["exponent", "determined_names"] == "rank (visual)" and counts["held", "denied_count"] == "0"
    assert scaling_study.overall(scaling_study.fits(curves[1:])).query("metric == 'curves_count'")[
        "value"].tolist() == ["0", "0"]  # fmt: skip


def sized(nll, seeds=(0, 1, 2)):
    """Runs of bases by name: (parameters, loss)."""
    made = [(n, run(name, "visual", loss, seed)) for name, (n, loss) in nll.items() for seed in seeds]
    return [type(one)(one.key, one.settings, one.metrics, {"base_parameters": n}, {}, None)
            for n, one in made]  # fmt: skip


def test_each_base_is_held_against_the_next_smaller_one():
    runs = sized({"m": (3e6, 0.7), "s": (1e6, 0.9), "l": (8e6, 0.8)})
    steps = scaling_study.judge_bases(runs, values=column)
    verdicts = steps.set_index("comparison")["verdict"].to_dict()
    assert verdicts == {"m_vs_s": "supported", "l_vs_m": "denied"}
    counts = scaling_study.overall(scaling_study.fits([]), steps).set_index(["of", "metric"])["value"]
    assert counts["bases", "steps_count"] == "2" and counts["bases", "supported_names"] == "m over s (visual)"
    assert scaling_study.judge_bases([]).empty
    nothing = scaling_study.overall(scaling_study.fits([]), scaling_study.judge_bases([]))
    assert nothing.set_index(["of", "metric"])["value"]["bases", "steps_count"] == "0"


def test_each_base_has_the_rate_that_its_validation_prefers():
    runs = [run("s", "visual", loss, 1000, rate) for rate, loss in ((1e-2, 0.5), (2e-2, 0.4))]
    rates = scaling_study.base_rates(runs)
    assert rates[["domain", "arm", "learning_rate"]].to_numpy().tolist() == [["visual", "s", 2e-2]]
    assert scaling_study.base_rates([]).empty


@pytest.fixture
def results(tmp_path) -> Path:
    write_arms(tmp_path / "03_main", {"full": (0.9, 3_218_064), "qlora": (1.2, 204_288)}, steps=60)
    write_arms(tmp_path / "08_bits", {"nf4": (1.0, 9), "mixed-25": (1.25, 204_288)}, steps=60)
    write_arms(tmp_path / "06_ranks", {"uniform": (1.1, 102_144)}, steps=60)
    write_placement(tmp_path / "09_rank_size_and_placement")
    return tmp_path


def test_only_arms_of_one_recipe_are_on_one_front(results):
    arms = scaling_study.arms_by_cost(results)
    own = arms[(arms["recipe"] == "main") & (arms["domain"] == "visual")].set_index("arm")
    assert set(own.index) == {"full", "qlora", "uniform", "mixed-25"}, "nf4 of 08 is qlora of 03 again"
    assert own["front_train_bytes"].to_dict() == {
        "full": True, "qlora": False, "uniform": True, "mixed-25": False}  # fmt: skip
    other = arms[(arms["recipe"] == "placement") & (arms["domain"] == "visual")].set_index("arm")
    assert set(other.index[other["front_trainable_parameters"]]) == {"rank-1", "text"}
    counts = scaling_study.fronts(arms).set_index(["recipe", "domain", "metric"])["value"]
    assert counts["main", "visual", "arms_count"] == 4
    assert counts["main", "visual", "front_train_bytes_count"] == 2
    assert counts["main", "visual", "trainable_parameters_spread"] == pytest.approx(3_218_064 / 102_144)


def test_arms_of_the_same_recipe_share_one_chart(results):
    write_arms(results / "03_main", {"full": (0.9, 3_218_064), "qlora": (1.2, 204_288)})
    arms = scaling_study.arms_by_cost(results)
    assert len(arms[arms["recipe"] == "main"]) == len(arms[arms["recipe"] == "placement"]) == 18
    assert set(distinct(arms)["recipe"]) == {"main", "ranks"}, "06 has another recipe"


def test_further_methods_of_03_stand_beside_arms_of_their_recipe(results):
    further = {"full": (0.7, 3_218_064), "houlsby": (1.3, 20_000)}
    write_arms(results / "03_main", further, ("more_runs", "more_cost", "more"))
    arms = scaling_study.arms_by_cost(results).query("domain == 'visual'").set_index(["recipe", "notebook"])
    assert set(arms.loc[("placement", "03_more"), "arm"]) == {"full", "houlsby"}
    assert set(arms.loc[("main", "03_main"), "arm"]) == {"full", "qlora"}
    assert ("main", "03_more") not in arms.index


def test_what_was_computed_in_is_part_of_a_recipe(results):
    write_arms(results / "06_ranks", {"uniform": (1.1, 102_144)}, steps=60, compute_dtype="bf16")
    arms = distinct(scaling_study.arms_by_cost(results)).query("domain == 'visual'")
    assert set(arms.loc[arms["recipe"] == "main", "arm"]) == {"full", "qlora", "mixed-25"}
    assert arms.loc[arms["recipe"] == "ranks", "arm"].tolist() == ["uniform"]


def test_tables_and_figures_tell_of_laws_and_fronts(tmp_path):
    (tmp_path / "results" / "10_scaling").mkdir(parents=True)
    write_scaling(tmp_path / "results")
    text = {name: build(tmp_path / "results").markdown() for name, build in SCALING_TABLES.items()}
    assert "| Training clips | Language shift | 5 from 75 to 1200 |" in text["scaling"]
    assert "Training clips | Visual" not in text["scaling"] and "| Text alone |" in text["pick"]
    assert "Fusion" not in text["pick"], "another arm is as cheap and better"
    assert "| Visual shift | s | 1000000 |" in text["bases"] and "supported" in text["bases"]
    figure = scaling_fits(tmp_path / "results")
    assert [panel.get_title().replace("\n", " ") for panel in figure.axes] == [
        "Ranks of each layer", "Training clips", "Parameters of the base"]  # fmt: skip
    assert len(pareto(tmp_path / "results").axes) == 4 * 3
    plt.close("all")
    fits = tmp_path / "results" / "10_scaling" / "fits.csv"
    fits.write_text(fits.read_text().splitlines()[0] + "\n")
    assert "--" in SCALING_TABLES["scaling"](tmp_path / "results").markdown()
    assert scaling_fits(tmp_path / "results").axes, "a profile with few sizes draws points alone"
    plt.close("all")


def test_the_five_bases_grow_and_are_tuned_as_the_arm_is():
    from vqlora.pretrain import new_model

    profile = load_profile("full", ROOT)
    counts = []
    for size in profile.scaling.bases:
        model, _ = new_model(size.recipe(profile.base))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert len(counts) == 5 and all(b > 1.5 * a for a, b in zip(counts, counts[1:], strict=False))
    folders = {size.name: f"somewhere/{size.name}" for size in profile.scaling.bases}
    runs = profile.scaling.base_runs(placement(), folders)
    assert {(one.method, one.base) for one in runs} == set(folders.items())
    assert len({(one.rank, one.steps, one.learning_rate, one.train_clips) for one in runs}) == 1
    tried = profile.scaling.base_runs(profile.placement, folders, sweep=True)
    assert {one.method for one in tried} == set(folders) and {one.eval_part for one in tried} <= {"val"}
    assert not {one.seed for one in tried} & {one.seed for one in runs}
    assert base_sizes.train_bases(ScalingSettings(), profile.base, "nowhere", "own") == {}
    released = ScalingSettings(bases=[size for size in profile.scaling.bases if size.name == "l"])
    assert base_sizes.train_bases(released, profile.base, "nowhere", "own") == {"l": "own"}
