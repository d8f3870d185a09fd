"""What a comparison reports, on invented runs whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from vqlora import comparison
from vqlora.config import RunSettings
from vqlora.store import StoredRun

CLIPS = [f"language-test-{number:05d}" for number in range(40)]
LEVEL = {"frozen": 4.0, "full": 0.7, "lora": 0.75, "qlora": 0.752}


class Run(StoredRun):
    """A stored run whose examples are made up when asked for."""

    def examples(self) -> pd.DataFrame:
        rng = np.random.default_rng([self.settings.seed, len(self.settings.arm)])
        hard = np.random.default_rng(5).normal(0, 0.2, len(CLIPS))
        nll = LEVEL[self.settings.arm] + hard + rng.normal(0, 0.01, len(CLIPS))
        return pd.DataFrame(
            {"clip": CLIPS, "task": "caption", "nll": nll, "meteor": 0.5 - nll / 20, "cider": 3 - nll}
        )


def column(examples: pd.DataFrame, metric: str) -> pd.DataFrame:
    return pd.DataFrame({"clip": examples["clip"], "value": examples[metric]})


def run(arm: str, seed: int, domain: str = "language", rate: float = 1e-2, **metrics) -> Run:
    settings = RunSettings(
        experiment="03_main",
        arm=arm,
        bits="nf4" if arm == "qlora" else "bf16",
        domain=domain,
        seed=seed,
        learning_rate=0 if arm == "frozen" else rate,
        steps=60,
        train_clips=100,
        eval_clips=40,
    )
    metrics = {
        "nll": LEVEL[arm],
        "meteor": 0.44,
        "cider": 2.2,
        "t2v_median_rank": 3.0,
        "clips": 40.0,
    } | metrics
    cost = {"train_bytes": 100e6, "wall_s": 12.0, "trainable_frac": 0.05}
    return Run(f"{arm}{seed}", settings, metrics, cost, {}, None)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [
        run(arm, seed, domain) for domain in ("language", "visual") for arm in LEVEL for seed in (0, 1, 2)
    ]


def test_summary_has_each_arm_and_metric_once_with_an_interval_around_its_mean(runs):
    table = comparison.summarise(runs, values=column, metrics=["nll", "cider", "meteor", "t2v_median_rank"])
    assert not table.duplicated(["domain", "arm", "metric"]).any()
    cell = table.set_index(["domain", "arm", "metric"])
    nll = cell.loc[("language", "qlora", "nll")]
    wanted = np.mean([one.examples()["nll"].mean() for one in runs if one.settings.arm == "qlora"])
    assert nll["value"] == pytest.approx(wanted) and nll["low"] < wanted < nll["high"]
    meteor = cell.loc[("visual", "lora", "meteor")]
    assert meteor["value"] == 0.44 and meteor["low"] < 0.44 < meteor["high"], "a corpus score keeps its value"
    assert np.isnan(cell.loc[("language", "lora", "t2v_median_rank"), "low"])
    assert cell.loc[("language", "lora", "train_bytes"), "value"] == 100e6
    assert "wall_s" not in set(table["metric"]), "times are bound to the machine"
    assert table.equals(
        comparison.summarise(runs, values=column, metrics=["nll", "cider", "meteor", "t2v_median_rank"])
    )


def test_the_interval_of_a_share_stays_between_0_and_1(runs):
    def few(examples: pd.DataFrame, metric: str) -> pd.DataFrame:
        return pd.DataFrame({"clip": CLIPS, "value": np.arange(len(CLIPS)) < 1 + (examples["nll"][0] > 0.75)})

    some = [run("lora", seed, t2v_r1=0.05) for seed in (0, 1)]
    table = comparison.summarise(some, values=few, metrics=["t2v_r1"]).set_index("metric")
    assert 0 <= table.loc["t2v_r1", "low"] < table.loc["t2v_r1", "value"] < table.loc["t2v_r1", "high"] <= 1


def test_a_metric_that_some_runs_leave_open_has_a_mean_and_no_interval(runs):
    some = [run("lora", 0, order_frac=0.9), run("lora", 1, order_frac=float("nan"))]
    table = comparison.summarise([*some, run("full", 0, order_frac=float("nan"))], metrics=["order_frac"])
    cell = table[table["metric"] == "order_frac"].set_index("arm")
    assert cell.loc["lora", "value"] == 0.9 and cell.loc[["lora", "full"], "low"].isna().all()
    assert np.isnan(cell.loc["full", "value"])


def test_a_run_without_a_metric_that_others_have_is_named(runs):
    short = run("full", 9)
    del short.metrics["cider"]
    with pytest.raises(ValueError, match=r"full-bf16/seed9: no metric 'cider'"):
        comparison.summarise([*runs, short], values=column, metrics=["cider"])
    with pytest.raises(ValueError, match="no runs"):
        comparison.summarise([])


def test_equal_arms_are_equivalent_and_better_ones_are_better(runs):
    table = comparison.judge(runs, comparison.planned_claims(0.05), values=column)
    assert len(table) == 6 and set(table["domain"]) == {"language", "visual"}
    row = table.set_index(["domain", "comparison"])
    assert row.loc[("language", "qlora_vs_lora"), "verdict"] == "supported"
    gain = row.loc[("visual", "lora_vs_frozen")]
    assert gain["value"] == pytest.approx(3.25, abs=0.02) and gain["verdict"] == "supported"
    assert np.isnan(gain["margin"]) and row.loc[("visual", "qlora_vs_lora"), "margin"] == 0.05
    assert (table["p_holm"] >= table["p"]).all() and (table["p_holm"] > table["p"]).any()


def test_a_difference_beyond_the_margin_is_denied_and_holm_spans_domains(runs):
    claims = [{"a": "full", "b": "frozen", "claim": "equivalent", "margin": 0.05}]
    table = comparison.judge(runs, claims, values=column)
    assert set(table["verdict"]) == {"denied"}
    one = comparison.judge(
        [r for r in runs if r.settings.domain == "visual"], comparison.planned_claims(0.05), values=column
    )
    both = comparison.judge(runs, comparison.planned_claims(0.05), values=column)
    assert both["p_holm"].max() >= one["p_holm"].max()


def test_shared_settings_leave_out_what_differs(runs):
    table = comparison.shared_settings(runs).set_index("metric")["value"]
    assert table["seeds"] == 3 and table["rank"] == 8 and table["steps"] == 60
    assert "learning_rate" not in table and "bits" not in table


def test_an_arm_in_several_bits_is_told_apart(runs):
    assert comparison.arm_names(runs)["qlora", "nf4"] == "qlora"
    other = run("qlora", 0)
    other = Run(
        other.key, other.settings.model_copy(update={"bits": "int8"}), other.metrics, other.cost, {}, None
    )
    assert comparison.arm_names([*runs, other])["qlora", "int8"] == "qlora-int8"
