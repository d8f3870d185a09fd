"""Learning rates: one for each arm and domain, where they are from, and the table of what was tried."""

import pandas as pd
import pytest
from test_rank_study import Run

from vqlora.config import RunSettings
from vqlora.experiments import MainSettings
from vqlora.studies import rate_study

ARMS = [{"label": label, "arm": "vqlora", "bits": "nf4", "learning_rate": 1e-2}
        for label in ("plain", "small", "never")]  # fmt: skip
SHAPE = {"steps": 4, "train_clips": 9, "eval_clips": 9}
MAIN = MainSettings(domains=["language", "visual"], arms=ARMS, seeds=[0, 1], **SHAPE)
BEST = {("language", "plain"): 4e-2, ("visual", "plain"): 1e-2, ("language", "small"): 2e-2}


def run(arm: str, domain: str, nll: float, rate: float, seed: int = 1000) -> Run:
    settings = RunSettings(experiment="sweep", label=arm, arm="vqlora", bits="nf4", domain=domain, seed=seed,
                           learning_rate=rate, **SHAPE)  # fmt: skip
    return Run(arm, settings, {"nll": nll}, {}, {}, None)


SWEEP = [run(arm, domain, 0.5 if rate == best else 0.9, rate)
         for (domain, arm), best in BEST.items() for rate in (1e-2, 2e-2, 4e-2)]  # fmt: skip


def test_each_domain_has_the_rate_that_its_own_sweep_chose(tmp_path):
    own, none = tmp_path / "swept.csv", tmp_path / "none.csv"
    rates = rate_study.settle(MAIN, SWEEP, own, none)
    found = rates.set_index(["domain", "arm"])
    assert found.loc[("language", "plain"), "learning_rate"] == 4e-2
    assert found.loc[("visual", "plain")].tolist() == ["nf4", 1e-2, "sweep"]
    assert found.loc[("visual", "small")].tolist() == ["nf4", 2e-2, "sweep on language"]
    assert found.loc[("visual", "never")].tolist() == ["nf4", 1e-2, "profile"]
    made = {(one.domain, one.method): one.learning_rate for one in rate_study.rated(MAIN.runs(), rates)}
    assert made["language", "plain"] == 4e-2 and made["visual", "plain"] == 1e-2
    assert {one.learning_rate for one in rate_study.rated(MAIN.runs(), rates, arm="small")} == {2e-2}
    again = rate_study.settle(MAIN, [], tmp_path / "other.csv", own)
    assert again.set_index(["domain", "arm"]).loc[("visual", "plain"), "origin"] == "committed sweep"
    assert set(rate_study.settle(MAIN, [], own, none)["origin"]) == {"profile"}
    assert not own.exists(), "what an earlier sweep left is not used once the profile has none"


def test_a_rate_is_chosen_by_the_mean_over_seeds():
    losses = {(1e-2, 1): 0.5, (1e-2, 2): 1.3, (2e-2, 1): 0.8, (2e-2, 2): 0.9}
    chosen = rate_study.choose([run("plain", "visual", nll, *tried) for tried, nll in losses.items()])
    assert chosen["learning_rate"].item() == 2e-2 and chosen["value"].item() == pytest.approx(0.85)
    assert rate_study.choose([]).empty


def test_an_arm_may_take_the_rates_of_another(tmp_path):
    rates = rate_study.settle(MAIN, SWEEP, tmp_path / "own.csv", tmp_path / "none.csv")
    taken = rate_study.taken_from(rates, {"never": "plain"}).set_index(["domain", "arm"])
    assert taken.loc[("language", "never")].tolist() == ["nf4", 4e-2, "sweep of plain"]
    assert taken.loc[("visual", "never"), "learning_rate"] == 1e-2
    others = rates[rates["arm"] != "never"].set_index(["domain", "arm"])
    pd.testing.assert_frame_equal(taken.loc[others.index], others)


def test_the_table_of_a_sweep_marks_the_rates_used_and_falls_back_to_the_committed_one(tmp_path):
    none = tmp_path / "none.csv"
    rates = rate_study.settle(MAIN, SWEEP, tmp_path / "own.csv", none)
    table = rate_study.sweep_table(SWEEP, rates, none)
    assert set(table.loc[table["chosen"], "value"]) == {0.5} and table["chosen"].sum() == len(BEST)
    table.assign(chosen=False).to_csv(tmp_path / "sweep.csv", index=False)
    pd.testing.assert_frame_equal(rate_study.sweep_table([], rates, tmp_path / "sweep.csv"), table)
    assert rate_study.sweep_table([], rates, none).empty


def test_a_table_without_domains_is_named_with_what_it_needs(tmp_path):
    (tmp_path / "swept.csv").write_text("arm,bits,learning_rate\nplain,nf4,0.01\n")
    with pytest.raises(ValueError, match=r"swept\.csv: no column 'domain'; needed: domain, arm, bits"):
        rate_study.settle(MAIN, [], tmp_path / "own.csv", tmp_path / "swept.csv")
