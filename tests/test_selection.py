"""Policies judged on one model, and the tables made of that."""
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from little_models import lively

from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, TrueEvent
from vqlora.quantize import load_quantized
from vqlora.selection import gains
from vqlora.selection.judge import COLUMNS, ORACLES, judge

POLICIES = ("uniform", "cumulative-coverage", "encoder", "oracles")


def made(count, seed):
    """Clips of 20 frames in which a bright square jumps at a known moment."""
    rng = np.random.default_rng(seed)
    clips, films = [], []
    for number in range(count):
        start = int(rng.integers(4, 14))
        film = rng.integers(90, 100, (20, 64, 64, 3), dtype=np.uint8)
        film[start:, 20:44, 20:44] += 100
        name = f"clip-{seed}-{number}"
        events = (TrueEvent("cat", "appear", start, start + 2),)
        clips.append(Clip(name, None, "test", {"en": ("the cat appears", "a cat appears")}, events=events))
        films.append(film)
    return clips, ArrayStore(clips, films)


@pytest.fixture(scope="module")
def judged():
    model, tokenizer = lively()
    parts = {"val": made(2, 1), "test": made(3, 2)}
    return judge(model, tokenizer, parts, POLICIES, (1, 4), exact=lively()[0]).examples


def test_every_policy_reads_every_clip_at_every_number_of_frames(judged):
    assert tuple(judged.columns) == COLUMNS
    names = {"uniform", "cumulative-coverage", "encoder", *ORACLES}
    assert set(judged["policy"]) == names and set(judged["frames"]) == {1, 4}
    assert len(judged) == len(names) * 2 * 5 and not judged.drop(columns="part").isna().any().any()


def test_what_counts_is_which_frames_were_read(judged):
    model, tokenizer = lively()
    clips, store = made(3, 2)
    alone = judge(model, tokenizer, {"test": (clips, store)}, ("uniform",), (4,), batch_size=1).examples
    beside = judged[(judged["part"] == "test") & (judged["policy"] == "uniform") & (judged["frames"] == 4)]
    np.testing.assert_allclose(alone["nll"], beside["nll"], rtol=1e-5)
    first = judge(model, tokenizer, {"test": (clips, store)}, ("top-k", "mmr"), (1,)).examples
    one, other = (first[first["policy"] == name].reset_index() for name in ("top-k", "mmr"))
    assert (one["nll"] == other["nll"]).all()  # both take the frame of the jump: read once


def test_oracles_see_the_event_and_change_based_frames_do_too(judged):
    seen = judged[judged["frames"] == 4].groupby("policy")["seen"].mean()
    assert seen["oracle-cover"] == seen["cumulative-coverage"] == 1.0 > seen["uniform"]
    footage = SimpleNamespace(n_frames=20, events=made(1, 0)[0][0].events)
    for rule in ORACLES.values():
        for k in (1, 2, 7, 20, 30):
            chosen = rule(footage, k, None)
            assert len(chosen) == min(k, 20) and (np.diff(chosen) > 0).all()


def test_the_encoder_policy_needs_the_exact_model():
    model, tokenizer = lively()
    with pytest.raises(ValueError, match="'encoder' needs the unquantized model"):
        judge(model, tokenizer, {"test": made(2, 0)}, ("uniform", "encoder"), (4,))


def test_the_encoder_policy_reads_frames_in_the_dtype_of_its_tower():
    model, tokenizer = lively()
    held = load_quantized(lively()[0], "nf4", compute_dtype="bf16", device="cpu")
    found = judge(held, tokenizer, {"test": made(2, 0)}, ("uniform", "encoder"), (4,), exact=model).examples
    assert set(found["policy"]) == {"uniform", "encoder"} and found["nll"].notna().all()


# --- tables


def invented(nll, part="test", clips=40, seed=0):
    """Examples with given mean NLL by policy, on the same clips."""
    noise = np.random.default_rng(seed).normal(0, 0.1, clips)
    rows = [(part, f"c{n}", policy, 4, value + noise[n] + 0.01 * (n % 3), 0.5, 0.5, 0.5, "d", 0)
            for policy, value in nll.items() for n in range(clips)]
    return pd.DataFrame(rows, columns=[*COLUMNS, "domain", "seed"])


def stored(examples):
    own = examples.drop(columns=["domain", "seed"])
    return [SimpleNamespace(settings=SimpleNamespace(domain="d", seed=0), examples=lambda: own)]


def test_the_oracle_is_the_design_that_validation_prefers():
    test = {"uniform": 1.0, "packets": 0.7, "oracle-cover": 0.9, "oracle-edges": 0.5}
    val = {"uniform": 1.0, "packets": 0.7, "oracle-cover": 0.4, "oracle-edges": 0.6}
    examples = gains.judged_examples(stored(pd.concat([invented(test), invented(val, "val")])))
    table = gains.policy_table(examples).set_index("policy")
    assert table.loc["oracle", "nll"] == pytest.approx(table.loc["oracle-cover", "nll"])
    assert gains.best_policy(gains.policy_table(examples, "val")) == "packets"


def test_a_policy_may_be_chosen_for_each_domain_and_number_of_frames():
    def both(uniform, packets, segments, oracle):
        return {"uniform": uniform, "packets": packets, "segments": segments, "oracle": oracle}

    def of(domain, test, val):
        parts = [gains.policy_table(invented(both(*values), part).assign(domain=domain), part)
                 for part, values in (("test", test), ("val", val))]
        return parts

    tests, vals = zip(of("a", (1.0, 0.7, 0.6, 0.5), (1.0, 0.7, 0.8, 0.1)),
                      of("b", (1.0, 0.5, 0.6, 0.5), (0.6, 0.7, 0.7, 0.1)), strict=True)
    table = gains.with_chosen(pd.concat(tests), pd.concat(vals))
    table = table.set_index(["domain", "policy"]).sort_index()
    for domain, policy in {"a": "packets", "b": "uniform"}.items():  # not what the test clips would choose
        assert table.loc[(domain, "chosen")].equals(table.loc[(domain, policy)])
    assert (table["gain"].xs("chosen", level="policy") >= 0).all()
    level = pd.concat(vals).assign(nll=1.0)
    for table in (level, level[::-1]):  # whatever the order of its rows
        assert set(gains.choices(table)["policy"]) == {"uniform"}
    closed = gains.closed_gap(gains.with_chosen(pd.concat(tests), pd.concat(vals)))
    assert set(closed["policy"]) == {"uniform", "packets", "segments", "chosen"}


def test_gain_is_paired_and_the_gap_is_closed_by_shares():
    table = gains.policy_table(invented({"uniform": 1.0, "packets": 0.7, "top-k": 1.2, "oracle": 0.6}))
    rows = table.set_index("policy")
    assert rows.loc["packets", "gain"] == pytest.approx(0.3) and rows.loc["packets", "gain_se"] < 1e-9
    assert rows.loc["uniform", "gain"] == 0
    closed = gains.closed_gap(table).set_index("policy")
    assert closed.loc["packets", "closed"] == pytest.approx(0.75)
    assert closed["worse"].to_dict() == {"uniform": False, "packets": False, "top-k": True}


def test_a_policy_that_beats_the_oracle_is_counted_with_and_without_what_lies_beyond():
    table = pd.concat([
        gains.policy_table(invented({"uniform": 1.0, "packets": packets, "oracle": 0.8}).assign(domain=name))
        for name, packets in (("a", 0.4), ("b", 0.88))])
    row = gains.verdicts(gains.closed_gap(table), ("packets",)).iloc[0]
    assert row["closed_frac"] == pytest.approx(0.72 / 0.4) and row["capped_frac"] == pytest.approx(0.8)
    assert row["half_cells"] == 2 == row["gap_cells"]


def test_without_a_gap_even_frames_are_enough():
    examples = invented({"uniform": 1.0, "packets": 1.0, "oracle": 1.0})
    shaken = np.random.default_rng(1).normal(0, 0.2, len(examples))
    table = gains.policy_table(examples.assign(nll=examples["nll"] + shaken))
    closed = gains.closed_gap(table)
    assert closed["closed"].isna().all()
    numbers = gains.summary(table, closed, "packets").set_index(["domain", "policy", "metric"])["value"]
    assert numbers["overall", "best", "closed_frac"] == "n/a"  # there was no gap to close


def test_models_trained_per_policy_are_paired_by_seed_and_clip():
    def run(policy, seed, nll):
        examples = pd.DataFrame({"task": "caption", "clip": ["a", "b"], "nll": nll, "slot": 0.5})
        settings = SimpleNamespace(domain="d", frames=4, seed=seed, select=policy)
        return SimpleNamespace(settings=settings, examples=lambda: examples)

    runs = [run("uniform", 0, [1.0, 2.0]), run("uniform", 1, [3.0, 4.0]),
            run("packets", 0, [0.5, 1.0]), run("packets", 1, [2.5, 3.0])]
    row = gains.per_policy_table(runs).set_index("policy").loc["packets"]
    assert row["gain"] == pytest.approx(0.75) and row["seeds"] == 2
    assert row["gain_se"] == pytest.approx(0.25) and math.isfinite(row["nll"])
    assert gains.per_policy_table([]).empty
