"""The lean step: the gradients of the plain one, per class; switches that say why; nothing left when off."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import eager_attention_forward

import vqlora
from vqlora.cost import step_bytes
from vqlora.modalities import describe, target_modules
from vqlora.quantize import load_quantized
from vqlora.step import attention
from vqlora.step.attention import lean_attention
from vqlora.zoo import ZOO, tiny_batch, tiny_model

DECODERS = [name for name in ZOO if name != "xclip"]


def plain_model(name, bits="nf4", compute="fp32", parts=None, **lora):
    """A tiny class under stock peft LoRA with something in B, in training mode."""
    base = tiny_model(name)
    parts = parts or [m for m in ("vision", "fusion", "text") if getattr(describe(base), m)]
    targets = target_modules(base, parts)
    base = load_quantized(base, bits, compute_dtype=compute, device="cpu")
    base.is_loaded_in_4bit = bits == "nf4"
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": targets, **lora}))
    for key, param in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(param, std=0.1)
    return without_dropout(model.train())


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def step(model, batch, **more):
    """(loss, gradients) of one training step; none are left."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, **more)
    output["loss"].backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return output["loss"].item(), grads, output


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def assert_same(one, other, tolerance):
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert other[1].keys() == one[1].keys()
    noise = 1e-4 * max(grad.norm() for grad in one[1].values())  # some gradients are zero but for rounding
    for key, grad in one[1].items():
        error = (other[1][key] - grad).norm() / grad.norm().clamp_min(noise)
        assert error < tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_plain_step(name):
    model = plain_model(name)
    batch = tiny_batch(name, model.get_base_model())
    plain = step(model, batch)
    with vqlora.lean_step(model, chunk=128) as lean:  # two label rows a chunk
        found = step(model, batch)
        assert lean.switches["adapters"].on
        assert lean.switches["labels"].on == (name != "xclip")
    assert_same(plain, found, 2e-4)
    if name != "xclip":
        assert found[2].logits is None
    again = step(model, batch)
    assert again[0] == plain[0] and all(torch.equal(again[1][k], g) for k, g in plain[1].items())


@pytest.mark.parametrize("name", ["kinevlm", "smolvlm", "qwen2_5_vl", "idefics"])
def test_checkpointing_gives_the_same(name):
    model = plain_model(name)
    base = model.get_base_model()
    batch = tiny_batch(name, base)
    plain = step(model, batch)
    checkpointed(base)
    with vqlora.lean_step(model):
        found = step(model, batch)
    assert_same(plain, found, 2e-4)


@pytest.mark.parametrize("bits, compute, tolerance", [("nf4", "bf16", 0.05), ("bf16", "bf16", 0.05),
                                                      ("int8", "fp32", 2e-4), ("bf16", "fp32", 2e-4)])
def test_gradients_in_other_bits(bits, compute, tolerance):
    model = plain_model("smolvlm", bits, compute)
    batch = tiny_batch("smolvlm", model.get_base_model())
    plain = step(model, batch)
    with vqlora.lean_step(model):
        assert_same(plain, step(model, batch), tolerance)


@pytest.mark.parametrize("gate", ["rank", "none"])
def test_gated_adapters_keep_their_gates(gate):
    base = load_quantized(tiny_model("smolvlm"), "nf4", compute_dtype="fp32")
    torch.manual_seed(0)
    model = get_peft_model(base, vqlora.VQLoraConfig(ranks=4, gate=gate)).train()
    for key, param in model.named_parameters():
        if "lora_B" in key or "lora_gate." in key:
            torch.nn.init.normal_(param, std=0.1)
    batch = tiny_batch("smolvlm", base)
    plain = step(model, batch)
    with vqlora.lean_step(model):
        found = step(model, batch)
        checkpointed(base)
        again = step(model, batch)
    assert any("lora_gate" in key for key in plain[1]) == (gate == "rank")
    assert_same(plain, found, 2e-4)
    assert_same(plain, again, 2e-4)


@pytest.mark.parametrize("chunk", [0, 128])
def test_the_loss_is_divided_as_the_trainer_asks(chunk):
    model = plain_model("smolvlm")
    batch = tiny_batch("smolvlm", model.get_base_model(), frames=(1, 3))
    batch["labels"][0, -2:] = -100  # rows with different numbers of labels
    count = torch.tensor(11)
    plain = step(model, batch, num_items_in_batch=count)
    with vqlora.lean_step(model, chunk=chunk):
        assert_same(plain, step(model, batch, num_items_in_batch=count), 2e-4)
        batch["labels"][:] = -100
        assert step(model, batch, num_items_in_batch=count)[0] == 0


def test_the_stock_trainer_trains_the_same(tmp_path):
    ends = []
    for lean in (False, True):
        model = plain_model("smolvlm", parts=["text"])
        base = model.get_base_model()
        rows = [tiny_batch("smolvlm", base, clips=1, seed=seed) for seed in range(8)]
        rows = [{key: value[0] for key, value in row.items()} for row in rows]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=lean, gradient_checkpointing_kwargs={"use_reentrant": False},
            dataloader_pin_memory=False, optim="sgd",
        )  # fmt: skip
        if lean:
            vqlora.lean_step(model)
        Trainer(model, arguments, train_dataset=rows).train()
        ends.append({key: p.detach() for key, p in model.named_parameters() if p.requires_grad})
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-5)


def test_evaluation_sees_all_logits_and_generation_works():
    model = plain_model("smolvlm").eval()
    batch = tiny_batch("smolvlm", model.get_base_model())
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        plain, said = model(**batch), model.generate(**prompt, max_new_tokens=3, do_sample=False)
        with vqlora.lean_step(model):
            found, again = model(**batch), model.generate(**prompt, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(said, again)


def test_frozen_towers_keep_no_graph_and_their_features_are_read_again(tmp_path):
    model = plain_model("smolvlm", parts=["text"])
    base = model.get_base_model()
    batch = tiny_batch("smolvlm", base)
    plain = step(model, batch)
    with vqlora.lean_step(model, features=tmp_path) as lean:
        first, second = step(model, batch), step(model, batch)
        cache = lean.caches["model.vision_model"]
        assert (cache.computed, cache.read) == (6, 6)
        other = tiny_batch("smolvlm", base, seed=1)
        step(model, other)
        assert cache.computed == 12
    assert_same(plain, first, 2e-4)
    assert_same(first, second, 1e-5)
    base.model.vision_model.embeddings.position_embedding.weight.data += 1  # other weights: other features
    with vqlora.lean_step(model, features=tmp_path) as lean:
        step(model, batch)
        assert lean.caches["model.vision_model"].computed == 6


def test_below_the_first_adapter_nothing_is_kept():
    model = plain_model("smolvlm", parts=["text"], target_modules=["layers.1.mlp.down_proj"])
    base = checkpointed(model.get_base_model())
    base.enable_input_require_grads()
    batch = tiny_batch("smolvlm", base, frames=8)
    seen = []
    base.model.text_model.layers[0].register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    plain = step(model, batch)
    lean = vqlora.lean_step(model)
    assert_same(plain, step(model, batch), 2e-4)
    lean.off()
    step(model, batch)
    assert seen == [True, False, True]


def test_a_reentrant_checkpoint_keeps_its_gradients():
    model = plain_model("smolvlm")
    base = model.get_base_model()
    batch = tiny_batch("smolvlm", base)
    base.enable_input_require_grads()
    checkpointed(base, reentrant=True)
    plain = step(model, batch)
    with vqlora.lean_step(model):
        assert_same(plain, step(model, batch), 2e-4)


def test_weights_are_unpacked_twice_under_checkpointing():
    class Count(TorchDispatchMode):
        times = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.times += func in (torch.ops.bitsandbytes.dequantize_4bit.default,
                                   torch.ops.bitsandbytes.gemm_4bit.default)  # fmt: skip
            return func(*args, **(kwargs or {}))

    model = plain_model("smolvlm", parts=["text"])
    checkpointed(model.get_base_model())
    batch = tiny_batch("smolvlm", model.get_base_model())
    times = []
    for unpack in (False, True):
        with vqlora.lean_step(model, unpack=unpack), Count() as count:
            step(model, batch)
        times.append(count.times)
    assert times[0] - times[1] == 14 - 3  # the first layer's q, k and v have no gradient to hand down


def test_a_step_holds_less_memory():
    model = plain_model("smolvlm", compute="bf16")
    batch = tiny_batch("smolvlm", model.get_base_model(), frames=16)
    plain = step_bytes(lambda: step(model, batch))
    with vqlora.lean_step(model):
        assert step_bytes(lambda: step(model, batch)) < 0.7 * plain


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal, masked, heads", [(True, False, 4), (False, True, 2), (False, False, 4)])
def test_lean_attention_is_attention(causal, masked, heads, fused, monkeypatch):
    monkeypatch.setattr(attention, "_FUSED", (torch.float32,) if fused else ())
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 300, 8, generator=rng).requires_grad_() for h in (4, heads, heads))
    mask = None
    if masked:
        mask = torch.ones(300, 300, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
        mask[0, :, :, :7] = False  # padding on the left: rows 0 to 6 see nothing
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, causal
    module.training = True
    grad = torch.randn(2, 300, 4, 8, generator=rng)
    if masked:
        grad[0, :7] = 0  # nobody reads them
    out, _ = lean_attention(module, q, k, v, mask, scaling=0.3)
    found = out, *torch.autograd.grad(out, (q, k, v), grad)
    bias = torch.zeros(300, 300)
    if causal or masked:
        allowed = torch.ones(300, 300, dtype=torch.bool).tril() if causal else mask
        bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    out, _ = eager_attention_forward(module, q, k, v, bias, scaling=0.3)
    plain = out, *torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, plain, strict=True):
        if masked and other.shape == out.shape:
            one, other = one[:, 7:], other[:, 7:]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_switches_say_why_they_are_off():
    model = plain_model("xclip", lora_dropout=0.1)
    lean = vqlora.lean_step(model, share=False)
    assert lean.switches["labels"].reason == "XCLIPModel has no output head"
    assert lean.switches["share"] == vqlora.step.Switch(False, "asked for")
    assert "frozen    off every tower learns" in str(lean)
    with pytest.raises(ValueError, match="XCLIPModel: its step is lean already"):
        vqlora.lean_step(model)
    lean.off()
    with pytest.raises(ValueError, match="attention: 'flash'; allowed: auto"):
        vqlora.lean_step(model, attention="flash")


def test_dropout_leaves_layers_to_peft():
    model = plain_model("smolvlm", lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = tiny_batch("smolvlm", model.get_base_model())
    torch.manual_seed(0)
    plain = step(model, batch)
    with vqlora.lean_step(model):
        torch.manual_seed(0)
        assert_same(plain, step(model, batch), 2e-4)


def test_logits_that_are_changed_before_the_loss_are_not_chunked_in_silence():
    model = plain_model("smolvlm")
    base = model.get_base_model()
    batch = tiny_batch("smolvlm", base)
    with vqlora.lean_step(model, chunk=1):
        base.lm_head.register_forward_hook(lambda module, args, out: out.tanh())
        with pytest.raises(RuntimeError, match=r"changes its logits before the loss.*chunk=0"):
            step(model, batch)
