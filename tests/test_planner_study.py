"""The planner's tables in notebook 08, from a table of plans and measurements; verdicts on memory claims."""

import pandas as pd
import pytest

from vqlora.cost import study
from vqlora.cost.check import _DEFAULTS
from vqlora.cost.plan import INFERENCE, TRAINING
from vqlora.cost.sizes import EXAMPLE, LEAST, STATED, stated_sizes


def rows(number, model, training, generation, flops=5e9):
    """What `check_planner` gives for one setting whose plans are off by these factors."""
    table = []
    for phase, parts, factor in (("training", TRAINING, training), ("generation", INFERENCE, generation)):
        table += [(f"{phase} {part}", 1e6 * factor, 1e6) for part in parts]
        whole = len(parts) * 1e6
        table += [(f"{phase} unexplained", 0, 5e4), (f"{phase} peak", whole * factor, whole)]
    table += [("resident peak", None, 9e7), ("step FLOPs", flops, flops), ("token FLOPs", 1e6, 1e6)]
    frame = pd.DataFrame(table, columns=["part", "predicted_bytes", "measured_bytes"])
    frame["ratio"] = frame.predicted_bytes / frame.measured_bytes
    return frame.assign(number=number, model=model, **_DEFAULTS, rank=8)


@pytest.fixture
def table():
    small = [rows(0, "KineVLM", 1.02, 0.95), rows(1, "KineVLM", 0.91, 0.89)]
    return pd.concat([*small, rows(12, "SmolVLM-135M", 1.2, 1.0)], ignore_index=True)


def test_each_setting_is_judged_by_itself_and_a_fault_is_named(table):
    judged = study.judged_peaks(table).set_index("number")
    assert judged["training_within"].to_dict() == {0: "yes", 1: "yes", 12: "no"}
    assert judged["generation_within"].to_dict() == {0: "yes", 1: "no", 12: "yes"}
    found = study.planner_summary(judged.reset_index()).set_index(["arm", "metric"])["value"]
    assert found["all", "settings_count"] == 3 and found["all", "within_count"] == 1
    assert found["all", "training_worst_frac"] == pytest.approx(0.2)
    assert found["KineVLM", "generation_worst_frac"] == pytest.approx(0.11)


def test_parts_and_operations_are_told_for_the_settings_shown(table):
    parts = study.memory_parts(table)
    assert list(parts.drop_duplicates("number")["held"]) == ["NF4", "16 bits", "NF4"]
    own = parts[(parts["number"] == 0) & (parts["phase"] == "training")].set_index("part")["measured_bytes"]
    assert own["peak"] == sum(own[name] for name in TRAINING) and own["resident"] == 9e7
    flops = study.flops(table)
    assert len(flops) == 6 and set(flops["of"]) == {"step", "token"}
    assert len(study.memory_parts(rows(3, "KineVLM", 1, 1))) == 0


def test_claims_are_judged_against_the_range_that_unstated_settings_span():
    stated = stated_sizes(["Qwen3-0.6B"]).iloc[0]
    assert stated["size"] == "0.6B"
    assert stated["least_gb"] == pytest.approx(LEAST * stated["parameters"] / 1e9)
    assert stated["lean_gb"] < stated["advised_gb"] < stated["rich_gb"]
    assert stated["fp16_verdict"] == "denied" and stated["stated_fp16_gb"] < stated["least_gb"]
    inside = stated["lean_gb"] <= stated["stated_qlora_gb"] <= stated["rich_gb"]
    assert stated["qlora_verdict"] == ("undecided" if inside else "denied")
    assert stated["verdict"] == "denied" and f"{stated['stated_qlora_gb']:g} GB" in stated["why"]
    assert set(STATED).isdisjoint(EXAMPLE)
    found = study.claims_summary(stated.to_frame().T).set_index(["arm", "metric"])["value"]
    assert found["0.6b", "verdict"] == "denied" and found["all", "denied_count"] == 1


def test_a_setting_that_was_measured_with_this_code_is_not_measured_again(tmp_path, table):
    table[table["number"] == 0].to_csv(study.kept_file(0, tmp_path), index=False)
    table[table["number"] == 12].to_csv(study.kept_file(12, tmp_path), index=False)
    said = []
    found = study.check_apart([0, 12], tmp_path, workers=2, say=said.append)
    assert found["number"].drop_duplicates().tolist() == [0, 12]
    assert said[1] == "12: predicted / measured: training 1.200, generation 1.000"


def test_a_range_holds_its_ends():
    from vqlora.cost.sizes import _within

    assert [_within(x, 1.0, 2.0) for x in (0.99, 1.0, 2.0, 2.01)] == ["denied", *["undecided"] * 2, "denied"]
