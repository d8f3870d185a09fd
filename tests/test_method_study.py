"""What notebook 03 makes of its further methods: rates, claims, files, tables; nothing without them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from invented_results import write_invented

from vqlora.config import RunSettings, arm_name
from vqlora.experiments import MainSettings, load_profile
from vqlora.report.method_tables import METHOD_TABLES
from vqlora.report.recompute import CHECKS
from vqlora.report.tables import write_tables
from vqlora.runs import ARM_MODULES
from vqlora.store import StoredRun, write_csv
from vqlora.studies import method_study

ROOT = Path(__file__).resolve().parents[1]
NLL = {"full": 0.8, "qlora": 1.0, "dora": 1.01, "prefix": 1.5, "posttrain-nf4": 0.81, "posttrain-int8": 1.1}
BITS = {"full": "bf16", "posttrain-int8": "int8"}


def methods(**more) -> MainSettings:
    arms = [{"arm": arm.split("-")[0], "bits": BITS.get(arm, "nf4"), "learning_rate": 1e-2,
             "label": arm if "-" in arm else None} for arm in NLL]  # fmt: skip
    arms[0]["sweep"], arms[1]["sweep"] = [1e-3, 2e-3], [1e-2]
    shape = {"steps": 4, "train_clips": 9, "eval_clips": 40, "seeds": [0, 1, 2], "domains": ["visual"]}
    return MainSettings(**{**shape, "arms": arms, **more})


class Run(StoredRun):
    """A stored run whose captions are made up when asked for, with the mean loss of its arm."""

    def examples(self) -> pd.DataFrame:
        rng = np.random.default_rng([self.settings.seed, list(NLL).index(self.settings.method)])
        nll = self.metrics["nll"] + rng.normal(0, 0.01, 40)
        return pd.DataFrame({"id": "x", "clip": [f"c{i}" for i in range(40)], "task": "caption", "nll": nll})


def column(examples, metric):
    return pd.DataFrame({"clip": examples["clip"], "value": examples[metric]})


def run(settings: RunSettings, nll: float) -> Run:
    cost = {"step_peak_bytes": 2e6, "train_cpu_s": 30.0 + settings.seed, "trainable_parameters": 10.0}
    cost |= {"quantized_bytes": 5e5} if settings.arm == "posttrain" else {}
    return Run(f"{settings.name}", settings, {"nll": nll}, cost, {}, None)


@pytest.fixture
def made() -> dict[str, pd.DataFrame]:
    runs = [run(settings, NLL[settings.method]) for settings in methods().runs()]
    return method_study.tables(methods(), runs, ["language", "visual"], values=column)


def test_domains_have_rates_of_their_own_and_what_is_quantized_afterwards_those_of_full(tmp_path):
    both = methods(domains=["language", "visual"])
    asked = method_study.sweep_of(both, "released")
    assert [(run.method, run.eval_part) for run in asked] == ([("full", "val")] * 2 + [("qlora", "val")]) * 2
    best = {"language": 2e-3, "visual": 1e-3}
    sweep = [run(settings, abs(settings.learning_rate - best[settings.domain])) for settings in asked]
    for made, origin in ((sweep, "sweep"), ([], "committed sweep")):
        rates = method_study.settle(both, made, tmp_path / f"{origin}.csv", tmp_path / "sweep.csv")
        found = {(row.domain, row.arm): (row.learning_rate, row.origin) for row in rates.itertuples()}
        for domain, rate in best.items():
            assert found[domain, "full"] == (rate, origin)
            for arm in ("posttrain-nf4", "posttrain-int8"):
                assert found[domain, arm] == (rate, f"{origin} of full")
            assert found[domain, "qlora"] == (1e-2, origin) and found[domain, "prefix"] == (1e-2, "profile")
    asked = method_study.runs_of(both, rates, "released")
    assert {(run.domain, run.method): run.learning_rate for run in asked} == {
        named: rate for named, (rate, _) in found.items()}  # fmt: skip
    table = method_study.sweep_table(both, sweep, rates, tmp_path / "none.csv")
    assert table.set_index(["domain", "arm", "learning_rate"])["chosen"].to_dict() == {
        ("language", "full", 1e-3): False, ("language", "full", 2e-3): True,
        ("visual", "full", 1e-3): True, ("visual", "full", 2e-3): False,
        ("language", "qlora", 1e-2): True, ("visual", "qlora", 1e-2): True,
    }  # fmt: skip


def test_each_method_is_held_against_qlora_and_what_is_quantized_afterwards_against_itself(made):
    tests = made["more_tests"].set_index(["family", "comparison"])
    verdicts = tests["verdict"].to_dict()
    assert verdicts == {
        ("methods", "full_vs_qlora"): "supported",
        ("methods", "dora_vs_qlora"): "denied",  # its gain is below the margin
        ("methods", "prefix_vs_qlora"): "denied",
        ("posttrain", "posttrain-nf4_vs_full"): "supported",
        ("posttrain", "posttrain-int8_vs_full"): "denied",
        ("posttrain", "posttrain-nf4_vs_qlora"): "supported",
        ("posttrain", "posttrain-int8_vs_qlora"): "denied",
    }
    assert tests.loc[("methods", "prefix_vs_qlora"), "value"] == pytest.approx(-0.5, abs=0.01)
    assert (tests["smallest_effect"] > 0).all() and (tests["p_holm"] >= tests["p"]).all()
    fell = made["more_overall"].set_index(["of", "metric"])["value"]
    assert fell["visual", "claims_count"] == "3" and fell["visual", "supported_names"] == "full fine-tuning"
    assert fell["visual", "denied_names"] == "DoRA, prefix tuning" and "DoRA" in fell["visual", "worse_names"]
    assert fell["language", "claims_count"] == "0" and fell["language", "supported_names"] == "none"


def test_costs_come_with_the_scores(made):
    cells = made["more"].set_index(["arm", "metric"])["value"]
    assert cells["qlora", "step_peak_bytes"] == 2e6 and cells["posttrain-nf4", "quantized_bytes"] == 5e5
    assert ("qlora", "quantized_bytes") not in cells.index
    assert cells["qlora", "nll"] == pytest.approx(1, abs=0.01)
    seconds = made["more_times"].set_index(["arm", "metric"])["value"]
    assert seconds["dora", "train_cpu_s"] == 31
    assert made["more_runs"].groupby("arm").size().to_dict() == dict.fromkeys(NLL, 3)


def test_a_profile_without_methods_says_so_and_no_more(tmp_path):
    rates = method_study.settle(None, [], tmp_path / "own.csv", tmp_path / "none.csv")
    assert method_study.sweep_of(None, "released") == method_study.runs_of(None, rates, "released") == ()
    assert method_study.sweep_table(None, [], rates, tmp_path / "none.csv").empty
    [(name, fell)] = method_study.tables(None, [], ["visual"]).items()
    (tmp_path / "results" / "03_main").mkdir(parents=True)
    write_csv(tmp_path / "results" / "03_main" / f"{name}.csv", fell)
    assert set(fell["value"]) == {"0", "none"}
    for build in METHOD_TABLES.values():
        assert build(tmp_path / "results").rows == (("not run with this profile",),)


def test_tables_have_every_method_and_its_price(tmp_path):
    write_tables(write_invented(tmp_path / "results"), tmp_path / "out")
    text = {name: (tmp_path / "out" / f"{name}.md").read_text() for name in METHOD_TABLES}
    [row] = [line for line in text["methods"].splitlines() if "Houlsby adapters" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:4] == ["Houlsby adapters", "1.250 [1.212, 1.288]", "74.4"]
    assert cells[6:-1] == ["43648", "150.0 MB", "157.0 MB", "37.0 s"]
    assert "DoRA beats QLoRA | 0.110 | [0.050, 0.170]" in text["method_tests"]
    assert "Full, then NF4 is no worse than full fine-tuning" in text["method_tests"]
    assert "| Language shift | Full fine-tuning | 1.005 |" in text["method_rates"]


def test_corrections_and_verdicts_are_checked_family_by_family(tmp_path):
    results = write_invented(tmp_path / "results")
    named = ("03_main/more_tests.csv", "p-values and intervals")
    [check] = [check for check in CHECKS if (check.file, check.source) == named]
    assert check.ready(results) and check.faults(results) == []
    tests = pd.read_csv(results / check.file)
    tests.loc[tests["family"] == "methods", "p_holm"] *= 2  # as if both families were corrected together
    write_csv(results / check.file, tests)
    assert "p_holm" in check.faults(results)[0]


def test_profiles_ask_for_every_method_of_the_comparison():
    wanted = {"full", "qlora", "dora", "houlsby", "prefix", "posttrain"}  # lora is in the main comparison
    asked = load_profile("full", ROOT).methods
    assert {arm.arm for arm in asked.arms} == wanted
    assert set(asked.domains) == {"language", "visual"}
    swept = {run.method for run in asked.sweep_runs()}
    assert swept == {arm.name.rpartition("-")[0] for arm in asked.arms if arm.arm != "posttrain"}
    assert load_profile("cpu", ROOT).methods is None and load_profile("smoke", ROOT).methods
    own_code = wanted - {"full", "qlora", "dora"}
    assert own_code <= set(ARM_MODULES), "a change of its code reruns an arm"
    assert arm_name("posttrain-nf4", "nf4") in {arm.name for arm in asked.arms}
