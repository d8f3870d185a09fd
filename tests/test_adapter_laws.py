"""What must hold exactly, on four classes in 16 and 4 bits; fresh processes included."""

import json
import subprocess
import sys

import peft
import pytest
import torch

import vqlora
from vqlora.adapter import FrameContext, GatedLayer, gated_layers
from vqlora.modalities import describe, plain_name, target_modules
from vqlora.quantize import load_quantized
from vqlora.zoo import tiny_batch, tiny_model

CLASSES = ("smolvlm", "llava_onevision", "idefics", "qwen2_5_vl")
BITS = ("bf16", "nf4")
ALL = pytest.mark.parametrize("name, bits", [(name, bits) for name in CLASSES for bits in BITS])
FEATURES = ("motion", "entropy")


def base(name, bits="bf16", compute="fp32"):
    return load_quantized(tiny_model(name), bits, device="cpu", compute_dtype=compute)


def adapted(name, bits="bf16", compute="fp32", **settings):
    """A model with adapters, A as peft draws it from seed 1."""
    model = base(name, bits, compute)
    torch.manual_seed(1)
    return peft.get_peft_model(model, vqlora.VQLoraConfig(**{"ranks": 4, **settings}))


def stir(model, seed=3):
    """Give B and the gates values as after training, the same for the same names."""
    for name, p in model.named_parameters():
        if ".lora_B." in name or ".lora_gate" in name:
            rng = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            p.data = (torch.randn(p.shape, generator=rng) * 0.3).to(p)
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@ALL
def test_at_initialisation_the_output_is_the_bases_bit_for_bit(name, bits):
    model, batch = base(name, bits), tiny_batch(name, tiny_model(name))
    wanted = model(**batch).logits
    model = peft.get_peft_model(model, vqlora.VQLoraConfig(ranks=4, gate="rank"))
    assert torch.equal(model(**batch).logits, wanted)
    assert not torch.equal(stir(model)(**batch).logits, wanted)  # else nothing was adapted


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("gate", ["scalar", "rank", "mixture"])
def test_an_open_gate_is_plain_lora_bit_for_bit(gate, bits, compute):
    check_plain_lora("smolvlm", bits, gate, compute)


@ALL
def test_without_a_gate_it_is_plain_lora_bit_for_bit(name, bits):
    check_plain_lora(name, bits, "none", "fp32")


def check_plain_lora(name, bits, gate, compute):
    """Outputs and gradients are equal, adapters drawn from one seed and B stirred alike."""
    batch = tiny_batch(name, tiny_model(name))
    model = adapted(name, bits, compute, gate=gate)
    plain = base(name, bits, compute)
    torch.manual_seed(1)
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=target_modules(plain)))
    drawn = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        if ".lora_A." in key:
            assert torch.equal(p, drawn[key])  # gates take no random numbers from the adapters
        if ".lora_B." in key:
            drawn[key].data = p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    outputs = [m(**batch) for m in (model, plain)]
    for out in outputs:
        out.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    found, wanted = gradients(model), gradients(plain)
    assert wanted and all(torch.equal(found[key], grad) for key, grad in wanted.items())
    gates = {key: grad for key, grad in found.items() if key not in wanted}
    assert bool(gates) == (gate != "none") and all(grad is not None for grad in gates.values())


def test_a_fresh_process_reloads_bit_for_bit_and_refuses_without_the_library(tmp_path):
    wanted = {}
    for name in CLASSES:
        for bits in BITS:
            model = stir(adapted(name, bits, gate="rank", modalities=("vision", "text")))
            model.save_pretrained(tmp_path / f"{name}-{bits}")
            logits = model(**tiny_batch(name, tiny_model(name))).logits
            torch.save(logits, tmp_path / f"{name}-{bits}.pt")
            wanted[f"{name}-{bits}"] = sorted(layer for layer, _ in gated_layers(model))
    (tmp_path / "layers.json").write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused", *wanted]


FRESH = """
import json, pathlib, sys
import peft, torch
folder = pathlib.Path(sys.argv[1])
wanted = json.loads((folder / "layers.json").read_text())
try:
    peft.PeftModel.from_pretrained(torch.nn.Linear(1, 1), folder / next(iter(wanted)))
except KeyError as error:
    assert "VQLORA" in str(error)
    print("refused")
import vqlora
from vqlora.adapter import gated_layers
from vqlora.zoo import tiny_batch, tiny_model
for key, layers in wanted.items():
    name, bits = key.rsplit("-", 1)
    base = vqlora.load_quantized(tiny_model(name), bits, device="cpu", compute_dtype="fp32")
    model = peft.PeftModel.from_pretrained(base, folder / key)
    assert sorted(layer for layer, _ in gated_layers(model)) == layers
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(**tiny_batch(name, tiny_model(name))).logits, torch.load(folder / f"{key}.pt"))
    print(key)
"""


def scores(clips=2, frames=3, seed=0):
    return torch.randn(clips, frames, len(FEATURES), generator=torch.Generator().manual_seed(seed))


def with_scores(name, bits="bf16", **settings):
    return stir(adapted(name, bits, features="scores", feature_names=FEATURES, **settings))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "name, gate", [*((name, "rank") for name in CLASSES), ("smolvlm", "scalar"), ("smolvlm", "selective")]
)
def test_frames_permuted_with_their_features_give_permuted_gates(name, gate, bits):
    model, f, order = with_scores(name, bits, gate=gate), scores(), [2, 0, 1]
    batch = tiny_batch(name, tiny_model(name))
    model(**batch, frame_features=f)
    before = vqlora.gates(model)
    key = next(key for key in ("pixel_values_videos", "pixel_values") if key in batch)
    pixels = batch[key] if batch[key].ndim == 5 else batch[key].unflatten(0, (2, 3, -1))
    batch[key] = pixels[:, order].reshape(batch[key].shape)
    model(**batch, frame_features=f[:, order])
    after = vqlora.gates(model)
    assert before and before.keys() == after.keys()
    rows = torch.tensor(order + [3 + t for t in order])
    for layer, gates in before.items():
        assert torch.equal(after[layer], gates[rows]), layer
        assert len(gates.unique(dim=0)) > 1  # else any order would do


@ALL
def test_the_features_of_a_frame_reach_its_own_rows_alone_until_frames_mix(name, bits):
    model, f = with_scores(name, bits, gate="rank"), scores()
    batch, known = tiny_batch(name, tiny_model(name)), describe(model.get_base_model())
    changed = f.clone()
    changed[1, 1] += 3.0  # clip 1, frame 1: number 4 of all
    seen = [outputs_by_layer(model, batch, features) for features in (f, changed)]
    touched = 0
    for layer, (before, frame) in seen[0].items():
        if known.mixed(layer):
            continue
        differs = (before != seen[1][layer][0]).any(-1)
        allowed = (frame == 4) | (frame == 6 + 1)  # and what shows no frame of clip 1
        assert not bool((differs & ~allowed.expand(differs.shape)).any()), layer
        touched += bool((differs & (frame == 4)).any())
    assert touched > 2


def outputs_by_layer(model, batch, features):
    """{layer: (output [.., d_out], frame of each row, broadcastable)} of one forward."""
    found, context, handles = {}, FrameContext.of(model), []
    for name, layer in gated_layers(model):

        def note(module, args, output, name=name):
            index = context.frames.index(module.layout, args[0].shape)
            found[name] = (output.detach(), index)

        handles.append(layer.register_forward_hook(note))
    model(**batch, frame_features=features)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("modality", ["vision", "fusion", "text"])
@ALL
def test_adapters_never_leak_onto_a_modality_that_was_not_named(name, bits, modality):
    known = describe(tiny_model(name))
    model = adapted(name, bits, modalities=(modality,))
    trainable = [plain_name(key) for key, p in model.named_parameters() if p.requires_grad]
    assert trainable and {known.of(key) for key in trainable} == {modality}
    assert all(m.modality == modality for m in model.modules() if isinstance(m, GatedLayer))
