"""The tiny models: what the table says of their parts is what a backward pass and NF4 find."""

import pytest
import torch

from vqlora.modalities import MODALITIES, describe, linear_layers, target_modules
from vqlora.modalities.rows import frame_rows
from vqlora.quantize import load_quantized
from vqlora.zoo import ZOO, tiny_batch, tiny_model

PARTS = {name: ("vision", "fusion", "text") for name in ZOO}
PARTS["qwen2_5_omni"] = MODALITIES


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_of_a_part_learns_but_those_that_never_do(name):
    model = tiny_model(name)
    known = describe(model)
    targets = target_modules(model, PARTS[name])
    assert {known.of(target) for target in targets} == set(PARTS[name])
    model(**tiny_batch(name, model)).loss.backward()
    layers = dict(linear_layers(model))
    for layer, module in layers.items():
        learns = module.weight.grad is not None and bool(module.weight.grad.any())
        if layer in targets:
            assert learns, layer
        if known.why_never(layer):
            assert not learns, layer
    # nothing of the model lies outside: output heads, layers that never learn and the few kept aside
    outside = [n for n in layers if n not in targets and not known.why_never(n)]
    assert set(outside) <= {
        "lm_head",
        "embed_head",
        "language_model.lm_head",
        "model.multi_modal_projector.time",
    }


@pytest.mark.parametrize("name", ZOO)
def test_attention_layers_are_found(name):
    model = tiny_model(name)
    modalities = [m for m in PARTS[name] if m != "fusion" or name in ("idefics", "idefics2", "xclip")]
    chosen = target_modules(model, modalities, "attention")
    assert not any("mlp" in layer or "fc1" in layer or "dense_h" in layer for layer in chosen)
    for modality in modalities:
        part = [layer for layer in chosen if describe(model).of(layer) == modality]
        assert len(part) >= 2, modality


@pytest.mark.parametrize("name", ZOO)
def test_nf4_holds_every_model(name):
    model = tiny_model(name)
    targets, batch = target_modules(model, PARTS[name]), tiny_batch(name, model)
    quantized = load_quantized(model, "nf4")
    assert set(targets) <= set(quantized.vqlora_precision.quantized)
    with torch.no_grad():
        assert torch.isfinite(quantized(**batch).loss)
    assert frame_rows(quantized, batch).frames == 6


@pytest.mark.parametrize("name", ZOO)
def test_models_and_batches_come_from_their_seeds(name):
    model, again = tiny_model(name), tiny_model(name)
    batch, same = tiny_batch(name, model), tiny_batch(name, again)
    assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(same[k])) for k in batch)
    other = tiny_batch(name, model, seed=1)
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, again(**same).loss)
        assert not torch.equal(model(**batch).loss, model(**other).loss)
        assert not torch.equal(model(**batch).loss, tiny_model(name, seed=1)(**batch).loss)
    assert not model.training


def test_what_a_class_does_not_allow_is_refused():
    with pytest.raises(KeyError, match="no tiny model 'gpt'; known: kinevlm, smolvlm"):
        tiny_model("gpt")
    with pytest.raises(ValueError, match=r"\[1, 2\]: clips of llava_onevision .* equally many"):
        tiny_batch("llava_onevision", tiny_model("llava_onevision"), frames=(1, 2))
    with pytest.raises(ValueError, match="X-CLIP takes 3"):
        tiny_batch("xclip", tiny_model("xclip"), frames=2)
