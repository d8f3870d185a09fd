"""What notebook 08 asks of the base: simulated bits, mixed bits, bases that load as any other."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from vqlora import comparison
from vqlora.base import load_base
from vqlora.baselines import prepare
from vqlora.config import RunSettings
from vqlora.cost import static_bytes
from vqlora.cost.inputs import clip_batch
from vqlora.data.kinemoji.write import write_domain
from vqlora.experiments import load_profile
from vqlora.mixed_bits import linear_bytes
from vqlora.modalities import target_modules
from vqlora.quantize import BLOCK, load_quantized
from vqlora.store import StoredRun
from vqlora.studies import bit_study
from vqlora.studies.bit_study import bit_claims, judge_bits, make_bases, mixed, simulate

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = SimpleNamespace(mixed=(50,), draws=2, simulated=(2,))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The released base; the table of its layers is made up."""
    model = load_base("released")[0]
    names = target_modules(model)
    entries = [model.get_submodule(name).weight.numel() for name in names]
    harm = np.random.default_rng(0).random(len(names))
    return model, pd.DataFrame({"layer": names, "entries": entries, "harm_nf4": harm})


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    bases, held = make_bases("released", tmp_path_factory.mktemp("bits"), base[1], SETTINGS)
    return {(one.label, one.seed): one for one in bases}, held.set_index(["label", "seed"])


def logits(model):
    with torch.no_grad():
        return model.eval()(**clip_batch(model, batch=2, frames=3, prompt=4, answer=4)).logits


def test_simulated_bits_are_so_many_values_a_group_and_fewer_lose_more():
    weight = torch.randn(8, 3 * BLOCK, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 3, 4, 8):
        held = simulate(weight, bits)
        groups, originals = held.unflatten(-1, (-1, BLOCK)), weight.unflatten(-1, (-1, BLOCK))
        assert max(len(group.unique()) for row in groups for group in row) <= 2**bits
        assert torch.allclose(groups.amin(-1), originals.amin(-1))
        assert torch.allclose(groups.amax(-1), originals.amax(-1), atol=1e-5)
        assert torch.allclose(simulate(held, bits), held, atol=1e-5)
        errors.append(float((held - weight).norm() / weight.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2 > 0.01 > errors[-1]


@pytest.mark.parametrize("shape, bits", [((2, 63), 3), ((2, 64), 0), ((2, 64), 9)])
def test_simulation_refuses_what_it_cannot_do(shape, bits):
    with pytest.raises(ValueError, match="allowed: rows of a multiple of 64, 1 to 8"):
        simulate(torch.ones(shape), bits)


def test_mixed_bits_and_their_control_spend_the_same_budget_in_another_way(base):
    model, layers = base
    prices = {name: linear_bytes(model.get_submodule(name), "bf16")
              - linear_bytes(model.get_submodule(name), "nf4") for name in layers["layer"]}  # fmt: skip
    whole, harm = sum(prices.values()), dict(zip(layers["layer"], layers["harm_nf4"], strict=True))
    chosen = mixed(model, layers, 25)
    others = [mixed(model, layers, 25, np.random.default_rng(seed)) for seed in range(3)]
    for kept in (chosen, *others):
        assert 0.2 * whole < sum(prices[name] for name in kept) <= 0.25 * whole
    assert len({chosen, *others}) == 4
    saved = [sum(harm[name] for name in kept) for kept in (chosen, *others)]
    assert max(saved) == saved[0]


def test_what_is_held_is_between_nf4_and_16_bits(made):
    held = made[1]
    order = [("int2", 0), ("nf4", 0), ("mixed-50", 0), ("bf16", 0)]
    assert held.loc[order, "weight_bytes"].is_monotonic_increasing
    assert 4.1 < held.loc[("nf4", 0), "linear_bits"] < 4.3 and held.loc[("bf16", 0), "linear_bits"] == 16
    assert held.loc[("int2", 0), "linear_bits"] == 2.5
    assert held.loc[("int2", 0), "origin"] == "simulation" and held.loc[("bf16", 0), "constant_bytes"] == 0
    assert {("random-50", 0), ("random-50", 1)} <= set(held.index)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_base_in_mixed_bits_comes_back_from_its_folder_as_it_was(made, base, compute):
    one = made[0]["mixed-50", 0]
    settings = SimpleNamespace(arm="qlora", bits=one.bits, compute_dtype=compute)
    again = prepare(load_base(one.source)[0], settings, device="cpu")
    kept = mixed(base[0], base[1], 50)
    first = load_quantized(load_base("released")[0], "nf4", skip=kept, compute_dtype=compute, device="cpu")
    assert set(again.vqlora_precision.quantized) == set(base[1]["layer"]) - set(kept)
    assert torch.equal(logits(again), logits(first))
    first = load_quantized(load_base("released")[0], "nf4", skip=kept, device="cpu")  # in the study's dtype
    assert static_bytes(first)["total"] == made[1].loc[("mixed-50", 0), "weight_bytes"]


def test_a_simulated_base_holds_few_values_in_its_layers_and_all_else_as_it_was(made, base):
    held = load_base(made[0]["int2", 0].source)[0]
    for name, parameter in base[0].named_parameters():
        other = held.get_parameter(name)
        if name.removesuffix(".weight") in set(base[1]["layer"]):
            groups = other.detach().unflatten(-1, (-1, BLOCK)).flatten(0, 1)
            assert max(len(group.unique()) for group in groups[:50]) <= 4
        else:
            assert torch.equal(parameter, other), name


def test_frozen_and_tuned_runs_start_from_their_bases(made):
    bits = load_profile("cpu", ROOT).bits
    bases = [*made[0].values(), bit_study.Base("mixed-25", "nf4", "some/folder")]
    frozen = bits.frozen_runs(bases)
    assert [(run.label, run.base, run.bits) for run in frozen] == [(b.label, b.source, b.bits) for b in bases]
    asked = {(run.arm, run.domain, run.eval_part, run.steps) for run in frozen}
    assert asked == {("frozen", "source", "val", 0)}
    tuned = bits.tuned_runs(bases)
    assert len(tuned) == len(bits.domains) * len(bits.arms) * len(bits.seeds)
    assert {run.base for run in tuned if run.label == "mixed-25"} == {"some/folder"}
    swept = load_profile("full", ROOT).bits.tuned_runs(bases, sweep=True)
    assert {run.eval_part for run in swept} == {"val"} and len({run.learning_rate for run in swept}) > 2
    with pytest.raises(ValueError, match="label 'mixed-25' is no base; allowed: nf4, "):
        bits.tuned_runs(bases[:-1])


class Run(StoredRun):
    """A stored run whose examples are made up when asked for."""

    def examples(self) -> pd.DataFrame:
        values = self.metrics["nll"] + np.random.default_rng(0).normal(0, 0.01, 30)
        return pd.DataFrame({"clip": [f"c{i}" for i in range(30)], "nll": values, "task": "caption"})


def scored(label, domain, nll, seed=0):
    arm, held = ("frozen", "bf16") if domain == "source" else ("lora", "bf16")
    settings = RunSettings(experiment="08_bits", label=label, arm=arm, bits=held, domain=domain, seed=seed,
                           learning_rate=0, steps=1, train_clips=9, eval_clips=30)  # fmt: skip
    return Run(f"{label}{domain}{seed}", settings, {"nll": nll}, {}, {}, None)


def column(examples, metric):
    return pd.DataFrame({"clip": examples["clip"], "value": examples[metric]})


def test_claims_are_those_between_the_bits_there_are_and_are_corrected_together(monkeypatch):
    judge = comparison.judge
    monkeypatch.setattr(comparison, "judge", lambda runs, claims: judge(runs, claims, values=column))
    assert bit_claims(0.05, ["bf16", "mixed-25"]) == []
    frozen = [scored(bits, "source", nll) for bits, nll in (("bf16", 0.40), ("nf4", 0.41), ("int2", 0.9))]
    tuned = [scored("bf16", "visual", 0.60), scored("nf4", "visual", 0.80)]
    tests = judge_bits(frozen, tuned, 0.05).set_index(["domain", "comparison"])
    assert tests["verdict"].to_dict() == {
        ("source", "nf4_vs_bf16"): "supported", ("source", "bf16_vs_int2"): "supported",
        ("visual", "nf4_vs_bf16"): "denied",
    }  # fmt: skip
    assert (tests["p_holm"] >= tests["p"]).all()


def test_layers_are_told_with_their_errors_and_the_harm_expected(tmp_path):
    write_domain(tmp_path, "source", {"val": 6}, 0, 1, progress=False, languages=("en",), audio=False)
    layers = bit_study.layer_table("released", tmp_path, 3).set_index("layer")
    errors = layers[["error_int8", "error_nf4", "error_fp4", "error_int3", "error_int2"]].mean()
    assert errors.is_monotonic_increasing and 0.07 < errors["error_nf4"] < 0.12
    assert set(layers["modality"]) == {"vision", "fusion", "text"}
    assert (layers[["fisher", "harm_nf4"]] > 0).all(axis=None) and np.isfinite(layers["harm_nf4"]).all()
