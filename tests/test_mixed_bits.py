"""Layers kept in 16 bits: within the memory they may cost, the most harmful per byte first."""

import pytest
import torch

from vqlora.cost import static_bytes
from vqlora.mixed_bits import expected_harm, keep_in_16bit, linear_bytes
from vqlora.modalities import target_modules
from vqlora.quantize import load_quantized
from vqlora.ranks import quantization_errors, signals
from vqlora.zoo import tiny_batch, tiny_model


def quantized(skip=()):
    return load_quantized(tiny_model("kinevlm"), "nf4", skip=skip, compute_dtype="fp32", device="cpu")


def harm(model):
    names, data = target_modules(model), [tiny_batch("kinevlm", model, seed=seed) for seed in range(2)]
    fisher = signals.gradients(model, names, data, each=True).energy()
    return expected_harm(model, quantization_errors(model, names), fisher)


def test_what_is_kept_costs_what_was_allowed_and_is_really_in_16_bits():
    model = tiny_model("kinevlm")
    found, all_in_four = harm(model), static_bytes(quantized())["total"]
    for allowed in (0, 60_000, 200_000):
        kept = keep_in_16bit(model, allowed, found)
        more = static_bytes(quantized(kept))["total"] - all_in_four
        assert more <= allowed + 1024 * len(kept)  # bitsandbytes keeps a code book for each layer
        assert bool(kept) == bool(allowed)
        packed = quantized(kept)
        assert all(packed.get_submodule(name).weight.dtype == torch.bfloat16 for name in kept)
    assert more > 150_000


def test_the_most_harmful_per_byte_go_first():
    model = tiny_model("kinevlm")
    names = target_modules(model)
    sensitivity = dict.fromkeys(names, 1.0) | {names[5]: 100.0, names[-1]: 50.0, names[0]: 0.0}
    layer = model.get_submodule(names[5])
    one = linear_bytes(layer, "bf16") - linear_bytes(layer, "nf4")
    assert keep_in_16bit(model, one, sensitivity) == (names[5],)
    everything = keep_in_16bit(model, 1e12, sensitivity)
    assert everything == tuple(names[1:])  # no harm, no need


def test_keeping_layers_brings_the_loss_nearer_to_that_of_16_bits():
    model = tiny_model("kinevlm")
    batch = tiny_batch("kinevlm", model)
    found = harm(model)
    with torch.no_grad():
        exact = model(**batch).logits
        gaps = []
        for allowed in (0, 150_000, 1e9):
            kept = keep_in_16bit(tiny_model("kinevlm"), allowed, found)
            gaps.append(float((quantized(kept)(**batch).logits - exact).square().mean()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_faults_are_told():
    with pytest.raises(ValueError, match="memory_bytes: -1"):
        keep_in_16bit(tiny_model("kinevlm"), -1, {})
    with pytest.raises(KeyError, match="'model.x' is no layer"):
        keep_in_16bit(tiny_model("kinevlm"), 9, {"model.x": 1.0})
