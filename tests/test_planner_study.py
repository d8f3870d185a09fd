"""The planner's tables in notebook 08, from a table of plans and measurements; verdicts on memory claims."""

import pandas as pd
import pytest
from transformers import LlamaConfig

from vqlora.cost import sizes, study
from vqlora.cost.check import _DEFAULTS
from vqlora.cost.plan import INFERENCE, TRAINING


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


def test_claims_are_judged_against_the_range_that_unstated_settings_span(monkeypatch):
    tiny = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                       vocab_size=256)  # fmt: skip

    def judged(fp16_gb, qlora_gb):
        monkeypatch.setattr(sizes, "CONFIGS", {"tiny": lambda: tiny})
        monkeypatch.setattr(sizes, "STATED", {"1B": ("tiny", fp16_gb, qlora_gb)})
        monkeypatch.setattr(sizes, "EXAMPLE", {})
        return sizes.stated_sizes().iloc[0]

    low = judged(1e-6, 1e-7)
    assert low["lean_gb"] < low["advised_gb"] < low["rich_gb"] and low["least_gb"] < low["full_gb"]
    assert low["least_gb"] == pytest.approx(sizes.LEAST * low["parameters"] / 1e9)
    assert (low["fp16_verdict"], low["qlora_verdict"], low["verdict"]) == ("denied",) * 3
    assert "1e-07 GB is less than the leanest setting takes" in low["why"]
    inside = judged(low["full_gb"], (low["lean_gb"] + low["rich_gb"]) / 2)
    assert (inside["fp16_verdict"], inside["qlora_verdict"]) == ("undecided", "undecided")
    assert "tokens, batch and rank are not stated" in inside["why"]
    found = study.claims_summary(low.to_frame().T).set_index(["arm", "metric"])["value"]
    assert found["1b", "verdict"] == "denied" and found["all", "denied_count"] == 1
    assert found["1b", "found_name"] == f"{low['least_gb']:.1f} GB or more at 16 bits"


def test_a_setting_that_was_measured_with_this_code_is_not_measured_again(tmp_path, table):
    table[table["number"] == 0].to_csv(study.kept_file(0, tmp_path), index=False)
    table[table["number"] == 12].to_csv(study.kept_file(12, tmp_path), index=False)
    said = []
    found = study.check_apart([0, 12], tmp_path, workers=2, say=said.append)
    assert found["number"].drop_duplicates().tolist() == [0, 12]
    assert said[1] == "12: predicted / measured: training 1.200, generation 1.000"


def test_predictions_are_taken_as_committed_where_a_profile_asks_for_none(tmp_path):
    for name, value in (("sizes.csv", "A-7B"), ("stated.csv", "7B")):
        (tmp_path / name).write_text(f"model\n{value}\n")
    known, stated = study.size_tables(None, tmp_path)
    assert known["model"].tolist() == ["A-7B"] and stated["model"].tolist() == ["7B"]


def test_a_range_holds_its_ends():
    found = [sizes._within(x, 1.0, 2.0) for x in (0.99, 1.0, 2.0, 2.01)]
    assert found == ["denied", "undecided", "undecided", "denied"]
