"""Verdicts on aims and claims, from measured costs whose answers are known."""

import math

import pandas as pd
import pytest

from vqlora.cost.bench_tables import cost_summary, costs, growth, ratios
from vqlora.cost.claims import (
    held_fractions,
    judge_aims,
    judge_claims,
    measured_claims,
    quality_losses,
    verdict,
)
from vqlora.experiments import CostModel

OPEN = -math.inf


@pytest.mark.parametrize(
    ("measured", "low", "high", "most", "word"),
    [
        ([(0.61, 0.62)], 0.60, 0.65, False, "supported"),
        ([(0.61, 0.62), (0.63, 0.66)], 0.60, 0.65, False, "undecided"),
        ([(0.1, 0.2), (0.8, 0.9)], 0.60, 0.65, False, "denied"),
        ([(0.1, 0.2), (0.61, 0.62)], 0.60, 0.65, False, "undecided"),
        ([(0.1, 0.2), (0.3, 0.4), (0.0, 0.005)], OPEN, 0.01, True, "denied"),
        ([(0.1, 0.2), (-0.1, 0.005)], OPEN, 0.01, True, "undecided"),
        ([(-0.2, 0.0), (-0.1, 0.005), (0.1, 0.2)], OPEN, 0.01, True, "supported"),
        ([(math.nan, math.nan)], 0.0, 1.0, False, "undecided"),
        ([], 0.0, 1.0, False, "undecided"),
    ],
)
def test_a_verdict_needs_all_or_most_of_what_was_measured(measured, low, high, most, word):
    assert verdict(measured, low, high, most) == word


def arm(name, peak, weights, trainable, frames=16, **more):
    row = {"model": "m", "frames": frames, "rank": 8, "batch": 1, "arm": name, "tokens": 100, "loss": 1.0,
           "trainable_parameters": trainable, "weights_bytes": weights, "constants_bytes": 0,
           "optimizer_bytes": 8 * trainable, "peak_bytes": peak, "resident_bytes": 10**6, "flops": 10**9,
           "static_bytes": weights, **more}  # fmt: skip
    return {**row, "total_bytes": row["static_bytes"] + row["optimizer_bytes"] + peak}


@pytest.fixture
def measured():
    """A model of 1,000 weights: float32 in full fine-tuning, a quarter of 16 bits in QLoRA."""
    steps = [row for frames in (4, 8, 16) for row in (
        arm("qlora", 100 * frames, 500, 20, frames), arm("full", 250 * frames, 4000, 1000, frames),
        arm("lora", 100 * frames, 2000, 20, frames), arm("vqlora+lean", 45 * frames, 500, 20, frames),
        arm("vqlora+lean+ckpt", 30 * frames, 500, 20, frames))]  # fmt: skip
    seconds = {"qlora": 1.0, "full": 2.0, "lora": 1 / 1.15, "vqlora+lean": 0.8, "vqlora+lean+ckpt": 1.0}
    times = [{"model": "m", "frames": frames, "rank": 8, "batch": 1, "arm": name, "round": number,
              "cpu_s": s * frames * number, "wall_s": s * frames}
             for frames in (4, 8, 16) for name, s in seconds.items() for number in (1, 2, 3)]  # fmt: skip
    steps, times = pd.DataFrame(steps), pd.DataFrame(times)
    return costs(steps, times), ratios(steps, times)


def test_aims_are_judged_at_their_setting(measured):
    found = judge_aims(measured[1], "m", 16, 8).set_index("aim")
    assert found.loc["peak", ["value", "verdict"]].tolist() == [0.45, "supported"]
    assert found.loc["time", "value"] == pytest.approx(0.8) and found.loc["time", "verdict"] == "denied"
    assert found.loc["total", "value"] == pytest.approx((500 + 160 + 720) / (4000 + 8000 + 4000))
    assert found.loc["total", "verdict"] == "supported"


def test_claims_get_the_number_and_the_word(measured):
    losses = pd.DataFrame([("d", metric, 0.1, 0.05, 0.2, 3) for metric in ("slot_frac", "cider")],
                          columns=["domain", "metric", "value", "low", "high", "seeds"])  # fmt: skip
    found = judge_claims(*measured, losses).set_index("claim")
    assert found.loc["weights", ["value", "verdict"]].tolist() == [0.25, "supported"]
    assert found.loc["adapters", ["value", "verdict"]].tolist() == [0.02, "supported"]
    assert found.loc["held", "value"] == pytest.approx(1 - (500 + 160) / 4000)
    assert found.loc["slower", "value"] == pytest.approx(-0.5) and found.loc["slower", "verdict"] == "denied"
    assert found.loc["unpacking", "value"] == pytest.approx(0.15)
    assert found.loc["unpacking", "verdict"] == "supported"
    assert found.loc["quality", "verdict"] == "denied" and found.loc["quality", "settings_count"] == 2
    saved = measured_claims(*measured, losses).query("claim == 'total'")["value"]
    assert len(saved) == 3 and saved.is_monotonic_decreasing, "more frames, more of what is not saved"


def test_claims_whose_arms_are_missing_are_undecided(measured):
    table, compared = measured
    alone = table[table["arm"] == "qlora"]
    assert held_fractions(alone[alone["frames"] == 4].set_index("arm")) == {}
    none = pd.DataFrame(columns=["domain", "metric", "value", "low", "high", "seeds"])
    found = judge_claims(alone, compared[compared["arm"] == "none"], none)
    assert set(found["verdict"]) == {"undecided"} and (found["settings_count"] == 0).all()


def test_losses_of_quality_are_paired_by_seed():
    rows = [("d", arm, seed, score * (1 + seed)) for arm, score in (("full", 0.4), ("qlora", 0.38))
            for seed in (0, 1, 2)]  # fmt: skip
    runs = pd.DataFrame(rows, columns=["domain", "arm", "seed", "slot_frac"])
    row = quality_losses(runs, ["slot_frac"]).iloc[0]
    assert row["value"] == pytest.approx(0.05)
    assert row["high"] - row["low"] < 1e-9, "seeds differ, pairs do not"
    runs.loc[5, "slot_frac"] *= 0.5
    wide = quality_losses(runs, ["slot_frac"]).iloc[0]
    assert wide["low"] < wide["value"] < wide["high"]


def test_the_paper_gets_its_numbers_by_key(measured):
    table, compared = measured
    answers = pd.DataFrame([{"model": "m", "bits": "nf4", "merged": True, "first_token_s": 1.0,
                             "next_token_s": 0.1, "static_bytes": 9, "total_bytes": 10}])  # fmt: skip
    main = CostModel(model="m", frames=(4, 8, 16))
    found = cost_summary(main, table, compared, growth(table, "frames"), answers)
    assert not found.duplicated(["domain", "arm", "metric"]).any()
    cells = found.set_index(["domain", "arm", "metric"])["value"]
    assert cells["main", "all", "frames"] == 16 and cells["main", "vqlora+lean", "peak_to_qlora"] == 0.45
    assert cells["growth", "qlora", "each_frame_peak_bytes"] == pytest.approx(100)
    assert cells["answers", "nf4-merged", "first_token_s"] == 1.0
