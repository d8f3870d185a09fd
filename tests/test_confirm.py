"""The primary claims of notebook 15: written down with their recipes, judged together."""

from pathlib import Path

import pandas as pd
import pytest
from test_rank_study import Run

from vqlora import stats
from vqlora.experiments import ConfirmPart, load_profile
from vqlora.report.confirm_tables import confirmation_table
from vqlora.settings_file import ConfigError, parse
from vqlora.studies import confirm_study

ROOT = Path(__file__).resolve().parents[1]
PROFILE = load_profile("confirm", ROOT)
NLL = {
    ("bits", "language"): {"lora": 1.0, "qlora": 1.001},
    ("bits", "visual"): {"lora": 0.7, "qlora": 0.7},
    ("gate", "inserts"): {"plain": 0.6, "rank": 0.4, "shuffled": 0.6},
    ("gate", "cutaways"): {"plain": 0.6, "rank": 0.61, "shuffled": 0.6},
    ("ranks", "language"): {"uniform": 1.0, "relative": 0.9},
    ("ranks", "visual"): {"uniform": 0.7, "relative": 0.9},
    ("textsplit", "language"): {"relative": 0.9, "text-heavy": 0.88},
    ("visionsplit", "visual"): {"relative": 0.9, "vision-heavy": 0.8},
}


def runs_of(part: ConfirmPart) -> list[Run]:
    made = []
    for settings in part.runs():
        nll = NLL[part.name, settings.domain][settings.method] + 1e-3 * (settings.seed % 3)
        metrics = {"nll": nll, "slot_frac": 0.5, "qa_frac": 0.6}
        made.append(Run(settings.name, settings, metrics, {}, {}, None))
    return made


def judged() -> pd.DataFrame:
    return confirm_study.judge(PROFILE.confirm, [runs_of(part) for part in PROFILE.confirm])


def test_holm_is_over_all_primary_claims_and_verdicts_follow():
    tests = judged()
    first = tests[tests["family"] == "primary"]
    assert len(first) == 6 and first["p_holm"].tolist() == stats.holm(first["p"]).tolist()
    found = first.set_index(["part", "domain"])["verdict"].to_dict()
    assert found == {
        ("bits", "language"): "supported", ("bits", "visual"): "supported", ("gate", "inserts"): "supported",
        ("gate", "cutaways"): "denied", ("ranks", "language"): "supported", ("ranks", "visual"): "denied",
    }  # fmt: skip
    counts = confirm_study.overall(tests).set_index(["of", "metric"])["value"]
    words = ("claims", "supported", "denied", "undecided")
    assert [counts["primary", f"{word}_count"] for word in words] == [6, 4, 2, 0]
    assert counts["primary", "denied_names"] == "gate on cutaways, ranks on visual"
    assert tests.loc[tests["family"] == "beside", "comparison"].unique().tolist() == ["rank_vs_plain"]
    later = tests[tests["family"] == "later"]
    assert later["p_holm"].tolist() == stats.holm(later["p"]).tolist()
    assert later.set_index("part")["verdict"].to_dict() == {"textsplit": "supported", "visionsplit": "denied"}


def test_the_table_sets_new_seeds_beside_what_was_found_before(tmp_path):
    assert "not run" in confirmation_table(tmp_path).latex()
    for folder, frame in (
        ("15_confirmation", judged()),
        ("03_main", pd.DataFrame({"domain": ["visual"], "comparison": ["qlora_vs_lora"], "value": [0.0123]})),
    ):
        (tmp_path / folder).mkdir()
        frame.to_csv(tmp_path / folder / "tests.csv", index=False)
    rows = confirmation_table(tmp_path).rows
    assert rows[1][:4] == ("QLoRA equals LoRA", "Visual shift", "0.012", "0.000") and rows[0][2] == "--"
    assert rows.count(None) == 2 and rows[-4][0] == "Gate beats plain adapters"
    assert rows[-1][0] == "Relative allocation is no worse than vision-heavy ranks"


def test_seeds_clips_and_rates_are_none_that_a_choice_was_made_on_and_those_that_it_made():
    full = load_profile("full", ROOT)
    before = (full.main, full.temporal, full.ranks)
    used = {seed for part in before for seed in (*part.seeds, *part.sweep_seeds)}
    assert PROFILE.data.seed != full.data.seed
    for part in PROFILE.confirm:
        assert len(part.seeds) == 10 and not used & set(part.seeds) and part.eval_part == "test"
    # Those of bits and ranks are of the first sweeps, one for both shifts, which profiles still start from.
    first = [(arm.label or arm.arm, arm.bits, arm.learning_rate)
             for arm in (*full.main.arms, *full.ranks.arms)]  # fmt: skip
    swept = pd.concat([pd.DataFrame(first, columns=["arm", "bits", "learning_rate"]),
                       pd.read_csv(ROOT / "results" / "05_temporal" / "swept.csv")])
    swept = swept.set_index(["arm", "bits"])
    for run in (run for part in PROFILE.confirm for run in part.runs()):
        like = swept.loc[("rank" if run.method == "shuffled" else run.method, run.bits)]
        assert run.learning_rate == like["learning_rate"]
        gated = run.arm == "vqlora" and run.gate != "none"
        assert not gated or run.gate_rate == like["gate_rate"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"claims": [{"a": "qlora", "b": "dora", "claim": "greater"}]}, "dora.*allowed: lora, qlora"),
        ({"claims": []}, "claims"),
    ],
)
def test_a_claim_names_arms_that_are_run(change, words):
    values = PROFILE.confirm[0].model_dump(mode="json") | change
    with pytest.raises(ConfigError, match=words):
        parse(ConfirmPart, values, "confirm")


def test_a_profile_takes_six_primary_comparisons_at_most():
    values = PROFILE.model_dump(mode="json")
    values["confirm"][1]["claims"][1]["family"] = "primary"
    with pytest.raises(ConfigError, match="8 primary comparisons; allowed: at most 6"):
        parse(type(PROFILE), values, "confirm.yaml")
