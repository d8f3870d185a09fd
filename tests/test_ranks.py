"""What allocators read off a model and its batches, and the ranks that come of it."""

import json
import math

import peft
import pytest
import torch
from little_adapters import stir
from torch import nn

import vqlora
from vqlora.adapter import gated_layers
from vqlora.modalities import describe, target_modules
from vqlora.quantize import load_quantized
from vqlora.ranks import costs_of, load_reference, measure_reference, save_reference, signals
from vqlora.zoo import ZOO, tiny_batch, tiny_model

BUDGET = 15_000


def batches(name="kinevlm", count=2):
    model = tiny_model(name)
    return [tiny_batch(name, model, seed=seed) for seed in range(count)]


def allocated(word="gradient", model=None, given=None, **settings):
    model = tiny_model("kinevlm") if model is None else model
    how = {name: settings.pop(name) for name in ("reference", "errors", "loss") if name in settings}
    config = vqlora.VQLoraConfig(**{"ranks": word, "budget": BUDGET, "gate": "none", **settings})
    return vqlora.allocate_ranks(model, config, batches() if given is None else given, **how)


def share(config, part):
    """Of all ranks, those in layers of a part."""
    return sum(rank for name, rank in config.ranks.items() if part in name) / sum(config.ranks.values())


# What is read


def test_spectra_are_those_of_the_gradients_that_autograd_gives():
    model, data = tiny_model("kinevlm"), batches()
    names = target_modules(model)
    (sum(model(**batch).loss for batch in data) / 2).backward()
    wanted = {name: torch.linalg.svdvals(model.get_submodule(name).weight.grad) ** 2 for name in names}
    model.zero_grad()
    for frozen in (False, True):
        found = signals.gradients(model.requires_grad_(not frozen), names, data)
        for name in names:
            scale = float(wanted[name][0])
            torch.testing.assert_close(found.spectra[name], wanted[name], rtol=1e-3, atol=1e-4 * scale)
    assert found.batches == 2
    assert found.energy()[names[0]] == pytest.approx(float(wanted[names[0]].sum()), rel=1e-3)


def test_four_bit_layers_have_gradients_of_the_same_size():
    names, data = target_modules(tiny_model("kinevlm")), batches()
    exact = signals.gradients(tiny_model("kinevlm"), names, data).energy()
    packed = load_quantized(tiny_model("kinevlm"), "nf4", compute_dtype="fp32", device="cpu")
    found = signals.gradients(packed, names, data).energy()
    ratios = [math.log(found[name] / exact[name]) for name in names]
    assert all(abs(ratio) < math.log(4) for ratio in ratios) and abs(sum(ratios) / len(ratios)) < 0.5


def test_reading_leaves_the_model_as_it_was():
    model, data = tiny_model("kinevlm").requires_grad_(False), batches(count=1)
    model.train()
    model.model.vision_tower.eval()
    names, before = target_modules(model), model(**data[0]).loss
    modes = [module.training for module in model.modules()]
    signals.gradients(model, names, data)
    signals.input_entropy(model, names, data)
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(**data[0]).loss, before)


def test_fisher_averages_squares_of_batches_that_cancel():
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    x = torch.tensor([[1.0, 0.0, 0.0]])

    def loss(model, batch):
        return batch["sign"] * model(batch["x"]).sum()

    data = [{"x": x, "sign": sign} for sign in (1.0, -1.0)]
    fisher = signals.gradients(layer, ["0"], data, loss, each=True).energy()["0"]
    assert fisher == pytest.approx(2.0)  # each batch's gradient has two entries of ±1
    with pytest.raises(ValueError, match="does not depend on any of the layers"):
        signals.gradients(layer, ["0"], data, loss)


def test_a_sketch_tells_the_leading_singular_values():
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 200, generator=rng)).Q for n in (1100, 1000))
    values = 0.8 ** torch.arange(200.0)
    dy, x = left * values, right  # 200 rows: G = dyᵀ x has exactly these singular values
    sketch = signals._accumulator(1100, 1000, "cpu", 0)
    assert isinstance(sketch, signals._Sketch)
    for part in range(4):
        rows = slice(50 * part, 50 * part + 50)
        sketch.add(dy.T[rows], x.T[rows])
    held = sketch.range.numel() + sketch.corange.numel()
    assert held < 1100 * 1000 / 2
    torch.testing.assert_close(sketch.spectrum()[:16], values[:16] ** 2, rtol=1e-3, atol=0)


def test_entropy_is_that_of_the_principal_directions():
    layer, rng = nn.Sequential(nn.Linear(8, 2)), torch.Generator().manual_seed(0)

    def entropy(scale):
        x = torch.randn(4000, 8, generator=rng) * scale
        return signals.input_entropy(layer, ["0"], [x], lambda model, batch: model(batch))["0"]

    assert entropy(torch.ones(8)) == pytest.approx(math.log(8), abs=0.03)
    assert entropy(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])) == pytest.approx(math.log(4), abs=0.03)


def test_quantization_errors_are_those_of_the_weights_that_bitsandbytes_holds():
    from bitsandbytes.functional import dequantize_4bit

    model = tiny_model("kinevlm")
    names = target_modules(model)
    found = signals.quantization_errors(model, names)
    whole = {name: model.get_submodule(name).weight.detach().to(torch.bfloat16).float() for name in names}
    packed = load_quantized(model, "nf4", compute_dtype="fp32", device="cpu")
    for name in names:
        weight = packed.get_submodule(name).weight
        lost = whole[name] - dequantize_4bit(weight.data, weight.quant_state).float()
        assert found[name] == pytest.approx(float(lost.square().sum()), rel=1e-3) and found[name] > 0
    with pytest.raises(ValueError, match="held in nf4; give the model before quantizing"):
        signals.quantization_errors(packed, names)
    sixteen = signals.quantization_errors(tiny_model("kinevlm"), names, bits="bf16")
    eight = signals.quantization_errors(tiny_model("kinevlm"), names, bits="int8")
    assert all(0 == sixteen[name] < eight[name] < found[name] for name in names)


# The ranks that come of it


@pytest.mark.parametrize("gate", ["none", "scalar", "rank", "mixture", "selective"])
def test_the_budget_counts_what_peft_makes_trainable(gate):
    for word in ("uniform", "gradient+motion"):
        config = allocated(word, gate=gate, rank_bounds={"vision": (0, 5), "text": (1, 64)})
        model = peft.get_peft_model(tiny_model("kinevlm"), config)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == config.allocation["spent"] <= BUDGET
        assert BUDGET - trainable <= 0.01 * BUDGET + 5  # the cheapest rank costs 128
        known = describe(tiny_model("kinevlm"))
        assert all(rank <= 5 for name, rank in config.ranks.items() if known.of(name) == "vision")
        assert all(rank >= 1 for name, rank in config.ranks.items() if known.of(name) == "text")


def test_heads_that_are_trained_too_count_in_the_budget():
    config = allocated("uniform", budget=20_000, modules_to_save=["multi_modal_projector.time"])
    model = peft.get_peft_model(tiny_model("kinevlm"), config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == config.allocation["spent"]


def test_every_layer_keeps_its_scale_whatever_its_rank():
    config = allocated(r=4, lora_alpha=12)
    layers = gated_layers(peft.get_peft_model(tiny_model("kinevlm"), config))
    assert len({layer.r["default"] for _, layer in layers}) > 2
    assert all(layer.scaling["default"] == pytest.approx(3.0) for _, layer in layers)
    config = allocated(r=4, lora_alpha=12, use_rslora=True)
    layers = gated_layers(peft.get_peft_model(tiny_model("kinevlm"), config))
    assert all(layer.scaling["default"] == pytest.approx(6.0) for _, layer in layers)


def test_ranks_are_saved_and_can_be_given_back_by_hand(tmp_path):
    config = allocated()
    assert 0 in config.ranks.values() and max(config.ranks.values()) > 1
    model = stir(peft.get_peft_model(tiny_model("kinevlm"), config))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["allocation"]["allocator"] == "gradient" and saved["allocation"]["batches"] == 2
    again = peft.PeftModel.from_pretrained(tiny_model("kinevlm"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batches()[0]).loss, model(**batches()[0]).loss)
    hand = vqlora.VQLoraConfig(ranks=saved["ranks"], gate="none")
    by_hand = peft.get_peft_model(tiny_model("kinevlm"), hand)
    one, two, three = ({n: p.shape for n, p in m.named_parameters()} for m in (model, again, by_hand))
    assert one == two == three


def test_gradient_ranks_go_where_the_loss_depends_on_the_layer():
    def seen(model, batch):
        return model.model.vision_tower(batch["pixel_values"].flatten(0, 1)).square().mean()

    config = allocated(loss=seen)
    assert share(config, "vision_tower") == 1.0
    assert 0 < share(allocated(), "vision_tower") < 1.0


def test_motion_moves_ranks_to_vision():
    def with_motion(size):
        data = batches()
        for batch in data:
            still = torch.zeros_like(batch["pixel_values"])
            still[:, 1::2] = size
            batch["pixel_values"] = still
        return data

    still, slow, fast = (
        share(allocated("motion", given=with_motion(size)), "vision_tower") for size in (0.0, 0.1, 1.0)
    )
    even = share(allocated("uniform"), "vision_tower")
    assert still < slow < fast and still < even < fast


def test_fixed_ratios():
    config = allocated("ratio", rank_ratio={"vision": 4, "text": 1})
    by_part = {
        part: {rank for name, rank in config.ranks.items() if part in name}
        for part in ("vision_tower", "language_model", "projector")
    }
    assert by_part["projector"] == {0}
    assert 3 * max(by_part["language_model"]) < min(by_part["vision_tower"])


def test_relative_ranks_divide_by_the_source_gradient(tmp_path):
    model = tiny_model("kinevlm")
    reference = measure_reference(model, batches(count=3))
    save_reference(tmp_path / "source.csv", reference)
    assert load_reference(tmp_path / "source.csv") == pytest.approx(reference, rel=1e-5)
    loud = {name: energy * (1e4 if "language" in name else 1.0) for name, energy in reference.items()}
    even = allocated("relative", reference=tmp_path / "source.csv")
    turned = allocated("relative", reference=loud)
    assert share(turned, "language_model") < 0.5 * share(even, "language_model")
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="reference: nothing for layer 'model.vision_tower"):
        allocated("relative", model=model)
    save_reference(tmp_path / "source_gradients.csv", reference)  # kept with the base, it is found
    assert allocated("relative", model=model).ranks == even.ranks


def test_a_layer_that_lost_more_gets_more():
    errors = {name: 9.0 if "layers.0" in name else 1.0 for name in target_modules(tiny_model("kinevlm"))}
    config = allocated("quantization", errors=errors, given=())
    assert share(config, "layers.0") > 2 * share(config, "layers.1")
    both = allocated("gradient+quantization", errors=errors)
    assert share(both, "layers.0") > share(allocated(), "layers.0")
    with pytest.raises(ValueError, match="errors: nothing for layer"):
        allocated("quantization")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_class_in_four_bits(name):
    model = load_quantized(tiny_model(name), "nf4", compute_dtype="fp32", device="cpu")
    data = [tiny_batch(name, model, seed=seed) for seed in range(2)]
    parts = [part for part in ("vision", "fusion", "text") if getattr(describe(model), part)]
    how = {} if "labels" in data[0] else {"loss": first_output}
    config = allocated(model=model, given=data, budget=30_000, modalities=parts, **how)
    adapted = peft.get_peft_model(model, config)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == config.allocation["spent"]
    assert 29_000 <= config.allocation["spent"] <= 30_000 and len(set(config.ranks.values())) > 1


def first_output(model, batch):
    values = model(**batch).values()
    return next(v for v in values if torch.is_tensor(v) and v.is_floating_point()).float().square().mean()


# Faults


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ranks": "gradients", "budget": 9}, "ranks: 'gradients' is no allocator; allowed: uniform, ratio"),
        ({"ranks": "gradient+x", "budget": 9}, "ranks: 'x' is no allocator"),
        ({"ranks": "gradient"}, "budget: None; ranks 'gradient' need a number"),
        ({"ranks": "gradient", "budget": 0}, "budget: 0"),
        ({"ranks": "ratio", "budget": 9}, "rank_ratio: None; ranks 'ratio' need"),
        ({"rank_ratio": {"text": -1}}, "rank_ratio: -1 of 'text'"),
        ({"rank_bounds": {"text": (4, 2)}}, "rank_bounds: .4, 2. of 'text'"),
    ],
)
def test_bad_settings_are_told_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        vqlora.VQLoraConfig(**settings)


def test_allocations_that_cannot_be_are_refused():
    least = costs_of(tiny_model("kinevlm"), vqlora.VQLoraConfig(gate="none")).least
    with pytest.raises(ValueError, match=f"least possible here is {least}"):
        allocated("uniform", budget=5)
    with pytest.raises(ValueError, match="batches: none given"):
        allocated("gradient", given=())
    with pytest.raises(ValueError, match="names no allocator"):
        vqlora.allocate_ranks(tiny_model("kinevlm"), vqlora.VQLoraConfig(ranks=4), batches())
    with pytest.raises(ValueError, match="bias: 'all' does not go with a budget"):
        allocated("uniform", bias="all")
    with pytest.raises(ValueError, match="rank_bounds: 'audio' is not among"):
        allocated("uniform", rank_bounds={"audio": (0, 2)})
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        allocated(loss=lambda model, batch: model(**batch).loss * math.nan)
    with pytest.raises(ValueError, match="the model gives no loss"):
        allocated(given=[{key: v for key, v in batches()[0].items() if key != "labels"}])
