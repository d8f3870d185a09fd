import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from settings_like import settings_like, tiny_smolvlm
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vqlora import quantize
from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.cost import static_bytes
from vqlora.held import Linear16
from vqlora.quantize import close_packing_trap, compute_dtype, describe_bits, layer_bits, load_quantized

TIME = "model.multi_modal_projector.time"


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, 15, (2, 16), generator=generator)
    ids[:, 0], ids[:, 1:9], ids[:, 9] = 1, 4, 5
    pixels = torch.rand(2, 2, 3, 64, 64, generator=generator) * 2 - 1
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def llama(width=64, tie=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        )
    )


def dequantized(model, reference):
    """`reference` (float32) with the weights that `model` really holds, as an ordinary float32 model."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        elif getattr(module, "weight", None) is not None:
            weight = module.weight.float()
        else:
            continue
        target = reference.get_submodule(name)
        target.weight.data = weight
        if getattr(module, "bias", None) is not None:
            target.bias.data = module.bias.float()
    return reference


@pytest.mark.parametrize("bits", ["nf4", "fp4", "bf16"])
def test_forward_equals_the_same_weights_in_float32(bits):
    model = load_quantized(tiny()[0], bits, compute_dtype="fp32")
    reference = dequantized(model, tiny()[0])
    x = batch()
    x["pixel_values"] = x["pixel_values"].bfloat16().float()  # the base casts pixels to its weights' dtype
    got, want = model.eval()(**x).logits, reference(**x).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_int8_close_in_training_and_evaluation():
    model = load_quantized(tiny()[0], "int8", compute_dtype="fp32")
    reference, x = dequantized(model, tiny()[0]), batch()
    want = reference(**x).logits
    trained, evaluated = model.train()(**x).logits, model.eval()(**x).logits
    assert (trained - want).norm() / want.norm() < 0.01
    assert 0 < (evaluated - want).norm() / want.norm() < 0.1  # bitsandbytes rounds activations too in eval


@pytest.mark.parametrize(
    "bits,cls", [("nf4", bnb.nn.Linear4bit), ("fp4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)]
)
def test_what_is_quantized_and_what_is_not(bits, cls):
    model = load_quantized(tiny()[0], bits)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept = name in ("lm_head", "embed_head", TIME)
            assert isinstance(module, cls) != kept, name
            assert layer_bits(module) == ("bf16" if kept else bits)
        elif isinstance(module, nn.Conv2d | nn.LayerNorm) or name.endswith("embed_tokens"):
            assert module.weight.dtype == torch.bfloat16, name
    assert getattr(model, "is_loaded_in_8bit" if bits == "int8" else "is_loaded_in_4bit")
    assert model.is_quantized and not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert set(model.vqlora_precision.kept) == {"lm_head", "embed_head", TIME}


def test_skip_adds_to_the_heads_and_idle_entries_are_errors():
    model = load_quantized(tiny()[0], "nf4", skip=("model.vision_tower", "*.mlp.down_proj"))
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in model.model.vision_tower.modules())
    assert layer_bits(model.lm_head) == "bf16"  # a list of one's own does not drop the default
    assert layer_bits(model.model.language_model.layers[0].mlp.down_proj) == "bf16"
    assert layer_bits(model.model.language_model.layers[0].mlp.up_proj) == "nf4"
    with pytest.raises(
        ValueError, match="skip: 'vision_tower' matches no layer.*did you mean 'model.vision_tower'"
    ):
        load_quantized(tiny()[0], "nf4", skip=("vision_tower",))
    with pytest.raises(ValueError, match="'nf3' is not known; allowed: nf4, fp4, int8, bf16"):
        load_quantized(tiny()[0], "nf3")


def test_width_that_is_no_multiple_of_the_block_is_refused():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    error = (bnb.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    assert error > 0.2  # the fault: 0.09 where the width fits
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: width 96 .* skip=\('model.layers.0"
    ):
        load_quantized(llama(96), "nf4")
    model = load_quantized(llama(96), "nf4", skip=("*.self_attn", "*.gate_proj", "*.up_proj"))
    assert layer_bits(model.model.layers[0].mlp.down_proj) == "nf4"
    assert load_quantized(llama(96), "int8").vqlora_precision.bits == "int8"


def test_stock_smolvlm():
    model = load_quantized(tiny_smolvlm(), "nf4", skip=("model.vision_model",))
    rows = {(row["modality"], row["bits"]): row for row in describe_bits(model) if row["kind"] == "linear"}
    assert set(rows) == {("vision", "bf16"), ("fusion", "nf4"), ("text", "nf4"), ("none", "bf16")}
    assert rows["text", "nf4"]["layers"] == 2 * 7
    pixels = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 8), 9)
    ids[:, 1:5] = model.config.image_token_id
    settings = settings_like("qlora", "nf4")
    model = attach(model, settings)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_head_by_option_unless_tied():
    model = load_quantized(llama(), "nf4", quantize_head=True)
    assert layer_bits(model.lm_head) == "nf4" and model.vqlora_precision.head == "nf4"
    assert load_quantized(llama(), "nf4").vqlora_precision.head == "bf16"
    with pytest.raises(ValueError, match="tied to the input embeddings"):
        load_quantized(llama(tie=True), "nf4", quantize_head=True)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_from_disk_equals_in_memory_and_saved_equals_loaded(tmp_path, bits):
    tiny()[0].to(torch.bfloat16).save_pretrained(tmp_path / "base")
    memory = load_quantized(tiny()[0], bits)
    disk = load_quantized(tmp_path / "base", bits)
    memory.save_pretrained(tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", bits)
    x = batch()
    for other in (disk, again):
        assert torch.equal(memory.eval()(**x).logits, other.eval()(**x).logits)
        assert describe_bits(memory) == describe_bits(other)
        assert memory.vqlora_precision == other.vqlora_precision
    with pytest.raises(ValueError, match=f"'fp4' asked for, but this model is stored in '{bits}'"):
        load_quantized(tmp_path / "saved", "fp4")
    with pytest.raises(ValueError, match=f"'fp4' asked for, but this model is stored in '{bits}'"):
        load_quantized(memory, "fp4")


def test_16_bit_storage_with_float32_compute_has_the_gradients_of_float32():
    reference = tiny()[0]
    for param in reference.parameters():
        param.data = param.data.bfloat16().float()
    reference.requires_grad_(False)
    held = load_quantized(tiny()[0], "bf16", compute_dtype="fp32")
    assert isinstance(held.model.vision_tower.layers[0].mlp.fc1, Linear16)
    x, grads = batch(), []
    for model in (reference, held):
        settings = settings_like("lora", "bf16")
        model.vqlora_precision = held.vqlora_precision
        model = attach(model, settings)
        for param in model.parameters():  # peft draws A in the dtype of the base's weight
            param.data = param.data.bfloat16().to(param.dtype) if param.requires_grad else param.data
        x["pixel_values"] = x["pixel_values"].bfloat16().float()
        model(**x).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grad.norm(), name


def test_a_held_model_can_be_quantized_further():
    model = load_quantized(
        load_quantized(tiny()[0], "bf16", compute_dtype="fp32"), "nf4", compute_dtype="fp32"
    )
    straight = load_quantized(tiny()[0], "nf4", compute_dtype="fp32")
    assert torch.equal(model(**batch()).logits, straight(**batch()).logits)


def test_bf16_compute():
    model = load_quantized(tiny()[0], "nf4", compute_dtype="bf16")
    assert model(**batch()).logits.dtype == torch.bfloat16
    assert model.vqlora_precision.compute == "bf16" and "asked for" in model.vqlora_precision.reason


def test_compute_dtype_probe(tmp_path):
    for flags, name in (
        ("fpu avx512f avx512_bf16", "bf16"),
        ("amx_bf16", "bf16"),
        ("avx512f avx512_vnni", "fp32"),
    ):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        found = compute_dtype(cpuinfo=cpuinfo)
        assert found.name == str(found) == name and "this CPU has" in found.reason
    assert compute_dtype(cpuinfo=tmp_path / "none").name == "fp32"
    assert "emulated" in compute_dtype("bf16", cpuinfo=cpuinfo).reason
    assert compute_dtype("fp32", cpuinfo=cpuinfo).dtype is torch.float32
    with pytest.raises(ValueError, match="'fp16' is not known; allowed: auto, fp32, bf16"):
        compute_dtype("fp16")


def test_describe_bits_adds_up():
    model = load_quantized(tiny()[0], "nf4")
    rows = describe_bits(model)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in tiny()[0].parameters())
    total = static_bytes(model)
    assert sum(row["bytes"] for row in rows) == total["weights"] + total["constants"]
    quantized = {row["modality"]: row for row in rows if row["bits"] == "nf4"}
    assert set(quantized) == {"vision", "fusion", "text"}
    assert all(
        0.5 < row["bytes"] / row["parameters"] < 0.8 for row in quantized.values()
    )  # 4 bits and constants


# --- the packing trap. This CPU need not have AVX512-BF16: bitsandbytes asks `has_avx512bf16` once per layer
# made, and --- repacks in eval mode where the answer was yes. Saying yes for it provokes the fault on any
# machine.


@pytest.fixture
def avx512_bf16(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def qlora(closed=True, monkeypatch=None):
    if not closed:
        for module in (quantize, __import__("vqlora.baselines", fromlist=["x"])):
            monkeypatch.setattr(module, "close_packing_trap", lambda model: 0)
    settings = settings_like("qlora", "nf4")
    model = attach(prepare(tiny()[0], settings), settings)
    generator = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model


def train_once(model):
    model.train()
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def evaluate(model):
    with torch.no_grad():
        return model.eval()(**batch()).loss.item()


def packed(model):
    return sum(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False)
        for m in model.modules()
        if isinstance(m, bnb.nn.Linear4bit)
    )


def test_the_open_trap_bites(avx512_bf16, monkeypatch):
    model = qlora(False, monkeypatch)
    first, _ = train_once(model)
    evaluated = evaluate(model)
    assert packed(model) > 0
    try:  # where rows' outputs are views, the packed layers cannot be trained at all
        again = train_once(model)[0]
    except RuntimeError as fault:
        assert "in-place operation" in str(fault)
        again = float("inf")
    assert abs(evaluated - first) > 1e-3 or abs(again - first) > 1e-3
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="repacked by an eval-mode forward.*load the model again"):
        close_packing_trap(model)


def test_closed_trap_train_evaluate_train_merge_save(avx512_bf16, tmp_path):
    model = qlora()
    first, grads = train_once(model)
    assert evaluate(model) == first  # train and eval agree to the bit
    again, grads_again = train_once(model)
    assert again == first and packed(model) == 0
    assert grads.keys() == grads_again.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(grads[name], grads_again[name]) and grads[name].abs().sum() > 0 for name in grads)

    model.save_pretrained(tmp_path / "adapter")
    settings = settings_like("qlora", "nf4")
    reloaded = peft.PeftModel.from_pretrained(
        prepare(tiny()[0], settings), tmp_path / "adapter", is_trainable=True
    )
    assert evaluate(reloaded) == first and evaluate(reloaded) == train_once(reloaded)[0]

    unmerged = copy.deepcopy(model)
    merged = model.merge_and_unload()
    close_packing_trap(merged)
    merged_loss = evaluate(merged)
    assert packed(merged) == packed(unmerged) == 0 and evaluate(unmerged) == first
    assert abs(merged_loss - first) < 0.2  # requantized to 4 bits: near, not equal
    merged.save_pretrained(tmp_path / "merged")
    fresh = load_quantized(tmp_path / "merged", "nf4")
    assert evaluate(fresh) == merged_loss and packed(fresh) == 0
