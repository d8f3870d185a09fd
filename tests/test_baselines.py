import pytest
import torch
from settings_like import settings_like

from vqlora.base import tiny
from vqlora.baselines import attach, prepare, trainable_report
from vqlora.modalities import describe, target_modules
from vqlora.quantize import load_quantized


def made(arm, bits, **overrides):
    settings = settings_like(arm, bits, **overrides)
    return attach(prepare(tiny()[0], settings), settings)


def test_frozen_and_full():
    assert trainable_report(made("frozen", "nf4"))["trainable"] == 0
    model = made("full", "bf16")
    report = trainable_report(model)
    assert report["trainable"] == report["total"] == report["base"] and report["trainable_frac"] == 1.0
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "arm,bits", [("lora", "bf16"), ("qlora", "nf4"), ("qlora", "fp4"), ("qlora", "int8")]
)
def test_counts_are_right_at_every_width(arm, bits):
    base = sum(p.numel() for p in tiny()[0].parameters())
    layers = [tiny()[0].get_submodule(name) for name in target_modules(tiny()[0])]
    wanted = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    report = trainable_report(made(arm, bits))
    assert report["base"] == base and report["trainable"] == wanted
    assert report["total"] == base + wanted and report["trainable_frac"] == wanted / (base + wanted)


def test_adapters_stay_on_the_named_parts_in_float32_and_all_get_gradients():
    model = made("qlora", "nf4", modalities=("vision",), layers="attention")
    known = describe(model.get_base_model())
    carrying = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(carrying) == 8 and all(
        "vision_tower" in name and known.of(name) == "vision" for name in carrying
    )
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    ids = torch.tensor([[1, 4, 4, 4, 4, 5, 9, 10]])
    model(input_ids=ids, labels=ids, pixel_values=torch.rand(1, 1, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_starts_as_the_base_and_depends_on_its_seed_alone():
    base = load_quantized(tiny()[0], "nf4")
    ids = torch.tensor([[1, 9, 10, 5]])
    before = torch.random.get_rng_state()
    one, two, other = (made("qlora", "nf4", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(base(ids).logits, one(input_ids=ids).logits)
    a, b, c = (dict(m.named_parameters()) for m in (one, two, other))
    names = [name for name in a if "lora_A" in name]
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in names)


def test_scaling():
    assert set(
        made("lora", "bf16", alpha=8, rank=4)
        .base_model.model.model.language_model.layers[0]
        .mlp.up_proj.scaling.values()
    ) == {2.0}
    assert set(
        made("lora", "bf16", alpha=8, rank=4, rslora=True)
        .base_model.model.model.language_model.layers[0]
        .mlp.up_proj.scaling.values()
    ) == {4.0}


def test_wrong_bases_are_refused():
    settings = settings_like("qlora", "nf4")
    with pytest.raises(ValueError, match="arm 'qlora' wants a base in 'nf4', this one is in 'fp32'"):
        attach(tiny()[0], settings)
    held = load_quantized(tiny()[0], "fp4")
    with pytest.raises(ValueError, match="wants a base in 'nf4', this one is in 'fp4'"):
        attach(held, settings)
    for step in (prepare, attach):
        with pytest.raises(ValueError, match="arm 'full'.* held in 'fp4'"):
            step(held, settings_like("full", "bf16"))


@pytest.mark.parametrize("gate", ["none", "rank"])
def test_the_gated_arm_has_the_same_adapters_as_qlora_and_gates_besides(gate):
    gated, plain = made("vqlora", "nf4", gate=gate), made("qlora", "nf4")
    ours, theirs = ({name: p for name, p in m.named_parameters() if p.requires_grad} for m in (gated, plain))
    assert set(theirs) <= set(ours) and all(torch.equal(ours[name], p) for name, p in theirs.items())
    rest = set(ours) - set(theirs)
    assert all(".lora_gate" in name for name in rest) and bool(rest) == (gate == "rank")
