"""The bench: real tiny steps through the stock Trainer, and tables of rows whose answers are known."""

import pytest

from vqlora.cost.bench import bench, measure_arm
from vqlora.cost.bench_pairs import measure_pairs, pair_table
from vqlora.cost.bench_tables import costs, growth, judge_claims, ratios
from vqlora.zoo import tiny_model


def row(arm, seconds, peak=100, frames=8, number=0, **more):
    return {"model": "m", "frames": frames, "rank": 8, "arm": arm, "round": number, "cpu_s": seconds,
            "wall_s": seconds, "peak_bytes": peak, "static_bytes": 50, "optimizer_bytes": 10, "tokens": 60,
            "trainable": 5, "resident_bytes": 400, "flops": 7.0 * frames, **more}  # fmt: skip


def test_arms_are_measured_on_a_real_step(tmp_path):
    model = tiny_model("smolvlm")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "tiny")
    rows = [measure_arm(arm, tmp_path / "tiny", frames=8, steps=1) for arm in ("qlora", "lean", "full")]
    qlora, lean, full = rows
    assert lean["loss"] == pytest.approx(qlora["loss"], rel=1e-3)
    assert lean["trainable"] == qlora["trainable"] < full["trainable"]
    assert lean["peak_bytes"] < qlora["peak_bytes"]
    assert lean["static_bytes"] == qlora["static_bytes"] < full["static_bytes"]
    assert sum(v for k, v in lean.items() if k.startswith("peak.")) <= lean["peak_bytes"] * 1.05
    assert len(lean["cpu_s"]) == 1 and lean["flops"] > 0
    with pytest.raises(KeyError, match="arm: 'dora'; allowed: qlora, lean"):
        measure_arm("dora", tmp_path / "tiny", frames=8)


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(KeyError, match="model: 'GPT'; allowed: KineVLM, SmolVLM-135M"):
        bench(["lean"], model="GPT", frames=[4], work=tmp_path)


def test_ratios_are_taken_within_a_round():
    rows = [row("qlora", [2.0]), row("lean", [1.0], peak=40), row("qlora", [8.0], number=1),
            row("lean", [6.0], peak=40, number=1)]  # fmt: skip
    table = ratios(rows, against=["qlora"]).set_index("what")
    assert table.loc["cpu_s", ["median", "low", "high"]].tolist() == [0.625, 0.5, 0.75]
    assert table.loc["cpu_s", "met"] and table.loc["peak_bytes", "median"] == 0.4
    assert costs(rows).set_index("arm").loc["lean", "tokens_per_s"] == pytest.approx(60 / 3.5)


def test_growth_finds_the_exponent():
    rows = [row("lean", [0.5 * frames**1.5], peak=3 * frames, frames=frames) for frames in (4, 8, 16, 32)]
    found = growth(costs(rows), "frames").set_index("what")
    assert found.loc["cpu_s", "exponent"] == pytest.approx(1.5)
    assert found.loc["peak_bytes", "exponent"] == pytest.approx(1.0) and found.r2.min() > 0.9
    with pytest.raises(KeyError, match="along: 'bits'; allowed: frames, rank"):
        growth(costs(rows), "bits")


def test_claims_get_verdicts():
    full = row("full", [1.0], peak=1000, static_bytes=400, trainable=100)
    qlora = row("qlora", [1.5], peak=200, static_bytes=70)
    found = judge_claims(costs([full, qlora])).set_index("claim")
    assert found.loc["base weights take 25% of 16 bits", "verdict"] == "supported"
    slower = found.loc["10-20% slower than full fine-tuning"]
    assert slower.verdict == "denied" and slower.measured == pytest.approx(0.5)
    assert found.loc["adapters are 1-5% of the base", "measured"] == 0.05
    assert judge_claims(costs([qlora])).empty


def test_pairs_are_plain_and_lean_steps_of_one_model(tmp_path):
    model = tiny_model("smolvlm")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "tiny")
    found = measure_pairs(tmp_path / "tiny", pairs=2, frames=2)
    assert len(found["pairs_s"]) == 2 and all(s > 0 for pair in found["pairs_s"] for s in pair)
    rows = [{"model": "m", "frames": 8, "rank": 8, "pairs_s": [[2.0, 1.0], [4.0, 3.0], [1.0, 0.6]]}]
    table = pair_table(rows).iloc[0]
    assert (table["median"], table.low, table.high, table.pairs) == (0.6, 0.5, 0.75, 3)
