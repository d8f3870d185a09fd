"""The bench: real tiny steps through the stock Trainer, and tables of rows whose answers are known."""

import pandas as pd
import pytest
import torch
from little_jobs import halved

from vqlora.cost import bench_study
from vqlora.cost.apart import apart
from vqlora.cost.bench import ARMS, batch_of, measure_arm, measure_rounds
from vqlora.cost.bench_inference import measure_inference, served
from vqlora.cost.bench_study import arms_of, gpu_paths, measure_dtypes
from vqlora.cost.bench_tables import costs, growth, ratios
from vqlora.cost.inputs import prompt_only
from vqlora.experiments import STEP_ARMS, CostModel, CostSettings
from vqlora.zoo import tiny_model

SETTING = {"model": "m", "frames": 8, "rank": 8, "batch": 1}


def step(arm, peak=100, **more):
    return {**SETTING, "arm": arm, "tokens": 60, "peak_bytes": peak, "static_bytes": 50, "flops": 7.0,
            "total_bytes": peak + 60, "resident_bytes": 400, **more}  # fmt: skip


def clock(arm, number, seconds, **more):
    return {**SETTING, "arm": arm, "round": number, "cpu_s": seconds, "wall_s": seconds, **more}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which a tiny SmolVLM stands in for the embedded base's checkpoint."""
    model, folder = tiny_model("smolvlm"), tmp_path_factory.mktemp("bench")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder / "KineVLM")
    return folder


def test_arms_are_measured_on_a_real_step(work):
    names = ("qlora", "lora", "full", "vqlora", "vqlora+lean")
    rows = {arm: measure_arm("KineVLM", arm, frames=8, work=work) for arm in names}
    qlora, plain, lean, full = rows["qlora"], rows["vqlora"], rows["vqlora+lean"], rows["full"]
    assert lean["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert lean["peak_bytes"] < min(plain["peak_bytes"], qlora["peak_bytes"])
    assert lean["static_bytes"] == plain["static_bytes"] < rows["lora"]["static_bytes"] < full["static_bytes"]
    assert lean["trainable_parameters"] == plain["trainable_parameters"] < full["trainable_parameters"]
    assert full["adapters_bytes"] == full["constants_bytes"] == rows["lora"]["constants_bytes"] == 0
    for row in rows.values():
        parts = sum(size for name, size in row.items() if name.startswith("peak."))
        assert 0.8 * row["peak_bytes"] < parts <= 1.05 * row["peak_bytes"]
        held = sum(row[f"{part}_bytes"] for part in ("weights", "constants", "adapters"))
        assert held == row["static_bytes"] and row["flops"] > 0
        assert row["total_bytes"] == held + row["optimizer_bytes"] + row["peak_bytes"]


def test_every_round_has_a_step_of_every_arm(work):
    rows = measure_rounds("KineVLM", ["qlora", "full"], rounds=2, frames=2, work=work)
    assert sorted((row["arm"], row["round"]) for row in rows) == [
        ("full", 1), ("full", 2), ("qlora", 1), ("qlora", 2)]  # fmt: skip
    assert all(row["cpu_s"] > 0 and row["wall_s"] > 0 for row in rows)


def test_aims_are_read_once_in_every_dtype(work, monkeypatch):
    def here(measure, asked, kept, **_):
        return [measure(**settings, work=kept) for settings in asked]

    monkeypatch.setattr(bench_study, "apart", here)
    main = CostModel(model="KineVLM", frames=(4,), at=4, rounds=1)
    known = pd.DataFrame({"aim": ["peak", "time", "total"], "metric": "ratio", "value": [9.0] * 3})
    found = measure_dtypes(main, ("fp32", "bf16"), known, kept=work)
    own = found["dtype"][0]
    assert found.columns[:3].tolist() == ["dtype", "aim", "metric"]
    assert found["dtype"].value_counts().to_dict() == {"fp32": 3, "bf16": 3}
    assert (found.loc[found["dtype"] == own, "value"] == 9).all()
    other = found[found["dtype"] != own].set_index("aim")["value"]
    assert 0 < other["peak"] < 1 and other["time"] > 0, "a lean step holds less in either"
    assert len(measure_dtypes(main, (own,), known, kept=work)) == 3
    paths = gpu_paths().set_index("path")["status"]
    assert paths["bfloat16 products"] == ("run" if own == "bf16" else "not run")


def test_unknown_names_are_named_with_those_there_are(work):
    with pytest.raises(KeyError, match="arm: 'dora'; allowed: qlora, lean"):
        measure_arm("KineVLM", "dora", frames=8, work=work)
    with pytest.raises(KeyError, match="model: 'GPT'; allowed: KineVLM, SmolVLM-135M"):
        measure_arm("GPT", "qlora", frames=8, work=work)


@pytest.mark.parametrize("bits, tolerance", [("bf16", 0.02), ("nf4", 0.5)])
def test_merged_adapters_answer_as_they_did_apart(work, bits, tolerance):
    one, other = (served(work / "KineVLM", bits, merged, 4) for merged in (False, True))
    inputs = prompt_only(batch_of(one, 1, 2, 8, 4), 4)
    with torch.no_grad():
        kept, merged = one(**inputs).logits, other(**inputs).logits
        with one.disable_adapter():
            moved = (kept - one(**inputs).logits).norm()
    assert moved > 0.1 * kept.norm(), "adapters that do something"
    assert (merged - kept).norm() < tolerance * moved
    assert not [name for name, _ in other.named_parameters() if "lora_" in name]


def test_what_serving_holds_follows_from_bits_and_merging(work):
    how = {"frames": 2, "work": work, "repeat": 1, "answer": 2}
    ways = {(bits, merged): measure_inference("KineVLM", bits, merged, **how)
            for bits in ("nf4", "bf16") for merged in (False, True)}  # fmt: skip
    held = {way: row["static_bytes"] for way, row in ways.items()}
    assert held["nf4", True] < held["nf4", False] < held["bf16", False]
    assert held["bf16", True] < held["bf16", False]
    for row in ways.values():
        assert 0 < row["first_token_s"] < 60 and row["next_token_s"] >= 0
        assert row["total_bytes"] == row["static_bytes"] + row["peak_bytes"] > row["static_bytes"]


def test_what_was_measured_is_kept(tmp_path):
    asked = [{"number": 4}, {"number": 6}]
    assert apart(halved, asked, kept=tmp_path) == [2, 3]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("halved-*.json")}
    assert len(files) == 2
    said = []
    assert apart(halved, [*asked, {"number": 8}], kept=tmp_path, say=said.append) == [2, 3, 4]
    assert said == ["halved number=8"]
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    with pytest.raises(ValueError, match="3 is odd"):
        apart(halved, [{"number": 3}], kept=tmp_path)
    assert len(list(tmp_path.glob("halved-*.json"))) == 3


def test_settings_of_a_model_and_the_arms_at_each():
    model = CostModel(model="m", frames=(4, 8), at=8, ranks=(2,))
    assert [(case["frames"], case["rank"]) for case in model.cases()] == [(8, 8), (4, 8), (8, 2)]
    assert arms_of(model, model.cases()[0], STEP_ARMS) == list(STEP_ARMS)
    longer = model.model_copy(update={"rounds_at": 9})
    assert [longer.rounds_of(case) for case in longer.cases()] == [9, model.rounds, model.rounds]
    assert {model.rounds_of(case) for case in model.cases()} == {model.rounds}
    assert arms_of(model, model.cases()[2], STEP_ARMS) == ["qlora", "vqlora+lean"]
    assert set(STEP_ARMS) <= set(ARMS)
    with pytest.raises(ValueError, match="at: 16; allowed: one of frames, 4, 8"):
        CostModel(model="m", frames=(4, 8))
    with pytest.raises(ValueError, match="arms: 'full' is missing"):
        CostSettings(arms=[arm for arm in STEP_ARMS if arm != "full"])


def test_ratios_are_taken_within_a_round():
    steps = pd.DataFrame([step("qlora"), step("vqlora+lean", peak=40)])
    times = pd.DataFrame([clock("qlora", 1, 2.0), clock("vqlora+lean", 1, 1.0), clock("qlora", 2, 8.0),
                          clock("vqlora+lean", 2, 6.0)])  # fmt: skip
    table = ratios(steps, times, against=["qlora"]).set_index("what")
    assert table.loc["cpu_s", ["median", "low", "high"]].tolist() == [0.625, 0.5, 0.75]
    assert table.loc["peak_bytes", "median"] == 0.4 and table.loc["total_bytes", "median"] == 100 / 160
    of_arms = costs(steps, times).set_index("arm")
    assert of_arms.loc["vqlora+lean", "tokens_per_s"] == pytest.approx(60 / 3.5)


def test_the_interval_of_a_median_has_the_ranks_that_hold_it():
    steps = pd.DataFrame([step("qlora"), step("vqlora+lean")])
    rounds = range(1, 10)
    times = pd.DataFrame([*(clock("qlora", number, 1.0) for number in rounds),
                          *(clock("vqlora+lean", number, float(number)) for number in rounds)])  # fmt: skip
    row = ratios(steps, times, against=["qlora"]).set_index("what").loc["cpu_s"]
    assert row[["low", "median", "high", "rounds"]].tolist() == [2, 5, 8, 9], "held in 96% of samples of nine"


def test_growth_finds_the_line_and_the_exponent():
    counts = (4, 8, 16, 32)
    steps = pd.DataFrame([step("qlora", peak=10 + 3 * n, frames=n, flops=2.0 * n**2) for n in counts])
    times = pd.DataFrame([clock("qlora", 1, 0.5 * n**1.5, frames=n) for n in counts])
    found = growth(costs(steps, times), "frames").set_index("what")
    assert found.loc["cpu_s", "exponent"] == pytest.approx(1.5)
    assert found.loc["flops", "exponent"] == pytest.approx(2.0)
    line = found.loc["peak_bytes"]
    assert (line.fixed, line.each) == (pytest.approx(10), pytest.approx(3)) and line.r2 == pytest.approx(1)
    assert line.each_low <= line.each <= line.each_high
    time = found.loc["cpu_s"]
    assert time.each_high - time.each_low > line.each_high - line.each_low, "a bent line is less certain"
    assert growth(costs(steps[:2], times[:2]), "frames").empty
    with pytest.raises(KeyError, match="along: 'bits'; allowed: frames, rank"):
        growth(costs(steps, times), "bits")
