"""Merging: exact where the gate is constant, told where it is not, refused where it cannot be."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vqlora.adapter import VQLoraConfig
from vqlora.adapter.merge import merge
from vqlora.modalities import target_modules
from vqlora.quantize import layer_bits, load_quantized
from vqlora.zoo import tiny_batch, tiny_model

NAME = "llava_onevision"


def adapted(gate="rank", bits="nf4", name=NAME, seed=1, **options):
    """Adapters and gates with values that matter."""
    base = load_quantized(tiny_model(name), bits, compute_dtype="fp32") if bits else tiny_model(name)
    options = {"r": 4, "modalities": ("vision", "text"), "layers": "attention", **options}
    return shaken(get_peft_model(base, VQLoraConfig(gate=gate, **options)), seed)


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_B" in name or "lora_gate." in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    return tiny_batch(NAME, tiny_model(NAME))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(
    "gate,control,bits,name",
    [
        ("none", None, None, NAME),
        ("rank", "constant", None, NAME),
        ("mixture", "constant", "bf16", "smolvlm"),
        ("scalar", "constant", "nf4", "smolvlm"),
        ("none", None, "nf4", "smolvlm"),
        ("rank", "constant", "fp4", "smolvlm"),
    ],
)
def test_exact_where_the_gate_is_constant(gate, control, bits, name):
    model = adapted(gate, bits, name, control=control)
    batch = tiny_batch(name, model.get_base_model())
    merged, report = merge(model, batch, dtype=torch.float32)
    assert report.exact and report.error.worst < 1e-5
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(logits(merged, batch), logits(model, batch), atol=1e-2)
    assert merge(model)[1].error is None  # a constant gate needs no calibration


def test_rounding_to_16_bits_is_reported_as_it_is(batch):
    model = adapted("none", None)
    merged, report = merge(model, batch)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and report.dtype == "bfloat16"
    want = logits(model, batch) * batch["attention_mask"][..., None]
    got = logits(merged.float(), batch) * batch["attention_mask"][..., None]
    off = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert report.error.worst == pytest.approx(float(off.max()), rel=0.15) and report.error.worst > 1e-4
    assert report.examples == 2


@pytest.mark.parametrize("gate", ["scalar", "rank", "mixture"])
def test_the_mean_gate_is_the_mean_over_rows(batch, gate):
    model = adapted(
        gate, None, layers=["model.language_model.layers.1.self_attn.o_proj"], modalities=("text",)
    )
    layer = model.get_base_model().model.language_model.layers[1].self_attn.o_proj
    seen = []
    hook = layer.register_forward_pre_hook(
        lambda m, args: seen.append(m.gate_of_rows("default", args[0].shape))
    )
    logits(model, batch)
    hook.remove()
    mean = seen[0].flatten(0, -2).mean(0).expand(4)
    merged, report = merge(model, batch, dtype=torch.float32)
    change = merged.model.language_model.layers[1].self_attn.o_proj.weight - layer.base_layer.weight
    torch.testing.assert_close(change, layer.delta_weight("default", mean), rtol=1e-4, atol=1e-5)
    assert not report.exact and report.gates[0]["lowest"] < report.gates[0]["highest"]
    assert 0 < report.error.mean <= report.error.worst < 1 and 0 < report.error.lost_mean < 1


def test_a_wrong_gate_would_cost_more_than_the_mean_one(batch):
    model = adapted("scalar", None)
    for name, param in model.named_parameters():
        if "lora_gate" in name and name.endswith("bias") and "trunk" not in name:
            param.data.fill_(1.5)  # gates well above 1: a merge that left them out would show
    plain, report = merge(model, batch, dtype=torch.float32)
    assert report.error.lost_worst < 0.2
    without, have = adapted("none", None), dict(model.named_parameters())
    for name, param in without.named_parameters():
        param.data.copy_(have[name].data)
    ungated = merge(without, batch, dtype=torch.float32)[0]
    wanted = logits(model, batch)
    assert (logits(ungated, batch) - wanted).norm() > 3 * (logits(plain, batch) - wanted).norm()


def test_the_model_is_left_as_it_was_and_several_batches_count(batch):
    model = adapted("rank", "nf4").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    second = tiny_batch(NAME, tiny_model(NAME), seed=1)
    _, report = merge(model, [batch, second])
    assert report.examples == 4 and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(report).startswith("16 layers merged into bfloat16 with the mean gate")


def test_it_reloads_bit_equal_in_a_process_without_vqlora(batch, tmp_path):
    merged, _ = merge(adapted("rank"), batch)
    merged.save_pretrained(tmp_path / "merged")
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as A\n"
        "m = A.from_pretrained(sys.argv[1] + '/merged', dtype='auto').eval()\n"
        "with torch.no_grad(): y = m(**torch.load(sys.argv[1] + '/batch.pt')).logits\n"
        "assert not {'vqlora', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "torch.save(y, sys.argv[1] + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt"), logits(merged, batch))
    assert getattr(merged.config, "quantization_config", None) is None
    assert not getattr(merged, "is_quantized", False)


def test_a_black_frame_and_features_of_a_selector_among_the_calibration():
    model = adapted("rank", "nf4", "smolvlm", features="scores", feature_names=("a", "b"))
    batch = tiny_batch("smolvlm", model.get_base_model())
    batch["pixel_values"][0, 1] = 0
    batch["frame_features"] = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    assert 0 < merge(model, batch)[1].error.lost_worst < 1


def test_requantization_has_its_own_error(batch):
    model = adapted("none", "nf4")
    merged, report = merge(model, batch, requantize="nf4")
    again = model.get_base_model().vqlora_precision
    for name in again.quantized:
        assert layer_bits(merged.get_submodule(name)) == "nf4"
    assert layer_bits(merged.lm_head) == "bf16"
    assert report.requantized.mean > report.error.mean and report.bits == "nf4"
    fine = merge(model, batch, requantize="int8")[1].requantized
    assert fine.mean < report.requantized.mean


def test_stock_lora_is_merged_as_peft_merges_it(batch):
    base = tiny_model(NAME)
    config = LoraConfig(r=4, target_modules=target_modules(base, ("text",)), modules_to_save=["lm_head"])
    model = shaken(get_peft_model(base, config))
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    merged, report = merge(model, batch, dtype=torch.float32)
    want = model.merge_and_unload()
    assert report.exact and report.error.worst < 1e-5
    for (name, a), (_, b) in zip(merged.named_parameters(), want.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_what_cannot_be_merged_is_refused_saying_why(batch):
    with pytest.raises(ValueError, match="has no adapters to merge"):
        merge(tiny_model(NAME), batch)
    with pytest.raises(
        ValueError, match=r"cannot merge model.vision.*differs from row to row.*`calibration`"
    ):
        merge(adapted("rank"))
    with pytest.raises(ValueError, match="gate 'selective' uses the base alone for some frames"):
        merge(adapted("selective"), batch)
    model = adapted("none", None)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite"):
        merge(model, batch)
    model = adapted("none", None)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already; call model.unmerge_adapter"):
        merge(model, batch)
    tied = tiny_model(NAME)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    model = get_peft_model(tied, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="cannot merge lm_head: its weight is shared by"):
        merge(model, batch)
    dora = get_peft_model(tiny_model(NAME), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="is more than a low-rank update; use peft's merge_and_unload"):
        merge(dora, batch)
    text = {key: batch[key][:, -4:] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="cannot merge model.vision_tower.*no row of the calibration"):
        merge(adapted("rank"), text)
    both = adapted("none", None)
    both.add_adapter("second", VQLoraConfig(gate="none", modalities=("text",), layers="attention"))
    both.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active at once; choose with model.set_adapter"):
        merge(both, batch)
