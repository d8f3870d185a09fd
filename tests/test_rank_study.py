"""What notebook 06 makes of its runs, and the settings it reads."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from vqlora import comparison
from vqlora.config import RunSettings
from vqlora.experiments import RankSettings, load_profile
from vqlora.ranks.allocate import load_reference, reference_weights, save_reference
from vqlora.report.rank_plots import ranks_by_layer
from vqlora.store import StoredRun, results_frame
from vqlora.studies import rank_study, rate_study

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    "model.vision_tower.layers.0.mlp.fc1",
    "model.multi_modal_projector.linear_1",
    "model.language_model.layers.0.mlp.up_proj",
)


class Run(StoredRun):
    """A stored run whose examples are made up when asked for."""

    def examples(self) -> pd.DataFrame:
        rng = np.random.default_rng(self.settings.seed)
        values = self.metrics["nll"] + rng.normal(0, 0.01, 30)
        return pd.DataFrame({"clip": [f"c{i}" for i in range(30)], "nll": values, "task": "caption"})


def column(examples, metric):
    return pd.DataFrame({"clip": examples["clip"], "value": examples[metric]})


def run(label, domain, nll, ranks=(4, 4, 4), seed=0):
    settings = RunSettings(
        experiment="06_ranks", label=label, arm="vqlora", bits="nf4", domain=domain, seed=seed,
        ranks="uniform", budget=100, learning_rate=1e-2, steps=60, train_clips=10, eval_clips=30,
    )  # fmt: skip
    metrics = {"nll": nll} | {f"rank.{n}": float(r) for n, r in zip(LAYERS, ranks, strict=True)}
    return Run(f"{label}{domain}{seed}", settings, metrics, {}, {}, None)


NLL = {
    ("uniform", "language"): 0.80, ("vision-heavy", "language"): 0.90, ("text-heavy", "language"): 0.70,
    ("relative", "language"): 0.71, ("uniform", "visual"): 1.20, ("vision-heavy", "visual"): 1.10,
    ("text-heavy", "visual"): 1.30, ("relative", "visual"): 1.13,
}  # fmt: skip
RUNS = [run(arm, domain, nll, seed=seed) for (arm, domain), nll in NLL.items() for seed in (0, 1, 2)]


def test_methods_of_one_arm_are_told_apart_by_their_labels():
    summary = comparison.summarise(RUNS, metrics=["nll"], values=column)
    assert set(summary["arm"]) == {"uniform", "vision-heavy", "text-heavy", "relative"}
    frame = rank_study.runs_table(results_frame(RUNS))
    assert set(frame["arm"]) == set(summary["arm"]) and "label" not in frame
    assert not [name for name in frame if name.startswith("rank.")] and "rank" in frame
    assert set(rate_study.choose(RUNS)["arm"]) == set(summary["arm"])


def test_regret_is_the_worst_gap_to_the_best_of_a_domain():
    table = rank_study.regret(comparison.summarise(RUNS, metrics=["nll"], values=column)).set_index("arm")
    assert table.index[0] == "relative" and table.loc["relative", "worst"] == pytest.approx(0.03, abs=1e-6)
    assert table.loc["text-heavy", "language"] == 0 and table.loc["text-heavy", "worst"] == pytest.approx(0.2)


def test_budgets_are_compared_by_the_methods_that_all_of_them_have():
    small = [one for one in RUNS if one.settings.label != "vision-heavy"]
    summaries = {n: comparison.summarise(runs, metrics=["nll"], values=column) for n, runs in
                 ((100, RUNS), (50, small))}  # fmt: skip
    table = rank_study.by_budget(summaries)
    assert set(table["arm"]) == {"uniform", "text-heavy", "relative"} and set(table["budget"]) == {50, 100}
    told = table.set_index(["budget", "domain", "arm", "metric"])["value"]
    assert told[100, "visual", "relative", "gap_nll"] == 0, "the best split is not there at both"
    assert told[50, "worst", "text-heavy", "gap_nll"] == pytest.approx(0.17, abs=1e-6)
    assert told[50, "language", "uniform", "nll"] == pytest.approx(0.8, abs=0.01)
    whole = rank_study.over_budgets(table).set_index(["of", "metric"])["value"]
    assert whole["all", "best_name"] == "relative" and whole["all", "first_count"] == "2"
    assert float(whole["relative", "gap_nll"]) == pytest.approx(0.01, abs=1e-6)
    assert whole["further", "claims_count"] == "0"


def test_claims_at_several_budgets_are_one_family():
    one = comparison.judge(RUNS, rank_study.rank_claims(0.05), values=column)
    two = rank_study.judge_budgets({50: RUNS, 200: RUNS}, 0.05, values=column)
    assert len(two) == 2 * len(one) and two.columns[0] == "budget"
    assert (two["p_holm"] >= [*one["p_holm"], *one["p_holm"]]).all()
    assert (two.loc[two["budget"] == 50, "value"].to_numpy() == one["value"].to_numpy()).all()
    table = rank_study.by_budget({50: comparison.summarise(RUNS, metrics=["nll"], values=column)})
    whole = rank_study.over_budgets(table, two).set_index(["of", "metric"])["value"]
    assert whole["further", "claims_count"] == whole["further", "supported_count"] == "12"


def test_calibration_is_a_share_of_the_way_to_the_trained_adapter():
    cost = pd.DataFrame({"arm": ["uniform", "eva", "eva"], "attach_cpu_s": [0.0, 10.0, 30.0],
                         "train_cpu_s": [80.0, 90.0, 70.0]})  # fmt: skip
    found = rank_study.calibration(cost).set_index(["arm", "metric"])["value"]
    assert found["eva", "calibration_cpu_s"] == 20 and found["eva", "calibration_frac"] == 0.2
    assert found["uniform", "calibration_frac"] == 0


def test_the_planned_claims_ask_for_both_fixed_splits():
    tests = comparison.judge(RUNS, rank_study.rank_claims(0.05), values=column)
    verdicts = tests.set_index(["domain", "comparison"])["verdict"]
    assert len(verdicts) == 6 and (verdicts == "supported").all()
    worse = [run("relative", "visual", 1.25, seed=seed) for seed in (0, 1, 2)]
    kept = [one for one in RUNS if (one.settings.label, one.settings.domain) != ("relative", "visual")]
    tests = comparison.judge([*kept, *worse], rank_study.rank_claims(0.05), values=column)
    verdicts = tests.set_index(["domain", "comparison"])["verdict"]
    assert verdicts["visual", "relative_vs_vision-heavy"] == "denied"


def test_further_claims_are_about_methods_that_a_profile_has():
    assert rank_study.further_claims(["uniform", "relative"]) == []
    found = rank_study.further_claims(["relative", "gradient", "eva"])
    assert [claim["b"] for claim in found] == ["gradient", "eva"]


def test_ranks_are_read_back_by_layer_and_drawn():
    runs = [run("a", d, 1.0, (8, 2, 0), seed) for d in ("language", "visual") for seed in (0, 1)]
    runs += [run("b", d, 1.0, (seed, 4, 6), seed) for d in ("language", "visual") for seed in (0, 1)]
    layers = rank_study.ranks_of(runs)
    assert layers["modality"].drop_duplicates().tolist() == ["vision", "fusion", "text"]
    shares = rank_study.shares(layers).set_index(["domain", "arm"])
    assert shares.loc[("visual", "a")].tolist() == [0.2, 0.0, 0.8]  # fusion, text, vision
    moved = rank_study.spread_over_seeds(layers).set_index(["domain", "arm"])["moved_frac"]
    assert moved["visual", "a"] == 0 and moved["visual", "b"] == pytest.approx(1 / 21)
    figure = ranks_by_layer(layers)
    shown = figure.axes[0].collections[0].get_array()
    assert np.allclose(shown, [[8, 2, 0], [0.5, 4, 6]])
    plt.close(figure)


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_profiles_compare_methods_at_one_budget(name):
    ranks = load_profile(name, ROOT).ranks
    runs = ranks.runs()
    assert {run.budget for run in runs} == {ranks.budget}
    assert len({run.method for run in runs}) == len(ranks.arms)
    assert {"uniform", "relative", "scheduled", "adalora", "eva"} <= {run.method for run in runs}
    assert len({(run.rank, run.alpha, run.batch_size, run.steps) for run in runs}) == 1
    assert {run.budget for run in ranks.at(50_000).runs()} == {50_000}
    assert not {run.seed for run in ranks.sweep_runs()} & {run.seed for run in runs}


def test_other_budgets_may_have_fewer_methods():
    ranks = load_profile("full", ROOT).ranks
    assert {run.method for run in ranks.at(ranks.more_budgets[0]).runs()} == set(ranks.more_arms)
    with pytest.raises(ValueError, match="more_arms: 'nobody' is no arm's label; allowed: uniform"):
        RankSettings(**{**ranks.model_dump(), "more_arms": ("nobody",)})
    with pytest.raises(ValueError, match="more_budgets: 102144 is the budget itself"):
        RankSettings(**{**ranks.model_dump(), "more_budgets": (102144,)})


def test_other_budgets_are_tuned_over_rates_of_their_own():
    ranks = load_profile("full", ROOT).ranks
    small, large = sorted(ranks.more_budgets)
    for budget in (small, large):
        found = ranks.at(budget).sweep_runs()
        for method in ranks.more_arms:
            tried = {run.learning_rate for run in found if run.method == method}
            assert tried == set(ranks.more_sweeps[budget])
        assert {run.budget for run in found} == {budget}
    assert not ranks.at(7).sweep_runs()
    with pytest.raises(ValueError, match="more_sweeps: 7 is none of more_budgets; allowed: 51072, 204288"):
        RankSettings(**{**ranks.model_dump(), "more_sweeps": {7: (1,)}})
    with pytest.raises(ValueError, match="more_sweeps: 0.*; allowed: rates above 0"):
        RankSettings(**{**ranks.model_dump(), "more_sweeps": {small: (0, 1)}})


def test_a_method_takes_the_rate_that_is_best_on_a_domain(tmp_path):
    ranks = load_profile("full", ROOT).ranks
    there = ranks.at(51_072)
    loss = {("language", 0.01): 1.0, ("language", 0.02): 1.1, ("visual", 0.01): 0.8, ("visual", 0.02): 0.6}
    loss |= {(domain, 0.005): 2.0 for domain in there.domains}
    sweep = [StoredRun("key", run, {"nll": loss[run.domain, run.learning_rate]}, {}, {}, tmp_path)
             for run in there.sweep_runs() if run.method in ("uniform", "eva")]  # fmt: skip
    path = tmp_path / "budget_rates.csv"
    table = rank_study.tuned(there, sweep, path)
    best = table[table["chosen"]].set_index(["domain", "arm"])["learning_rate"]
    assert best["language", "uniform"] == best["language", "eva"] == 0.01 and best["visual", "eva"] == 0.02
    assert best["language", "relative"] == best["visual", "relative"] == 0.01  # not swept: as before
    assert table.loc[table["arm"] == "relative", "value"].isna().all()
    rank_study.table_of_rates([table]).to_csv(path, index=False)
    again = rank_study.tuned(there, [], path)
    asked = rate_study.rated(there.runs(), again[again["chosen"]])
    assert {(run.domain, run.learning_rate) for run in asked if run.method == "uniform"} == {
        ("language", 0.01), ("visual", 0.02)}  # fmt: skip
    other = rank_study.tuned(ranks.at(204_288), [], path)
    assert other["chosen"].all() and set(other["learning_rate"]) == {0.01}
    assert set(other["budget"]) == {204_288}
    assert list(rank_study.table_of_rates([])) == list(table)


def test_a_profile_without_a_budget_is_refused():
    arms = [{"arm": "vqlora", "bits": "nf4", "learning_rate": 1e-2, "overrides": {"ranks": "uniform"}}]
    values = {"domains": ["a"], "arms": arms, "seeds": [0], "steps": 4, "train_clips": 9, "eval_clips": 9}
    with pytest.raises(ValueError, match="budget"):
        RankSettings(**values)


def test_a_reference_says_which_weights_it_was_measured_on(tmp_path):
    path = tmp_path / "source_gradients.csv"
    assert reference_weights(path) == ""
    save_reference(path, {"a.b": 2.5, "a.c": 0.125}, "abc")
    assert reference_weights(path) == "abc" and load_reference(path) == {"a.b": 2.5, "a.c": 0.125}
    path.write_text("name,value\nx,1\n")
    with pytest.raises(ValueError, match="source_gradients.csv.*expected columns layer, energy"):
        load_reference(path)
