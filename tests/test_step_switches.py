"""What each switch of the lean step saves, what it leaves alone, and what it says."""

import pytest
import torch
from little_steps import assert_same, checkpointed, plain_model, step
from peft import AdaLoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

import vqlora
from vqlora.cost import step_bytes
from vqlora.held import Linear16
from vqlora.modalities import target_modules
from vqlora.step import attention, norms, products
from vqlora.step.attention import lean_attention
from vqlora.step.head import held_product
from vqlora.zoo import tiny_batch, tiny_model


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


@pytest.mark.parametrize("fused, room", [(True, 0), (False, 0), (False, 1 << 30)])
@pytest.mark.parametrize("causal, masked, heads", [(True, False, 4), (False, True, 2), (False, False, 4)])
def test_lean_attention_is_attention(causal, masked, heads, fused, room, monkeypatch):
    monkeypatch.setattr(attention, "_FUSED", (torch.float32,) if fused else ())
    monkeypatch.setattr(attention, "ROOM", room)  # for a block of one row, or all rows together
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, h, 8, generator=rng).transpose(1, 2) for h in (4, heads, heads))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
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


@pytest.mark.parametrize("rows", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_out_norm_is_the_norm(dtype, rows, monkeypatch):
    monkeypatch.setattr(norms, "ROWS", rows)
    torch.manual_seed(0)
    norm = LlamaRMSNorm(24).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    x, grad = torch.randn(2, 24, 5, dtype=dtype).mT.requires_grad_(), torch.randn(2, 5, 24, dtype=dtype)
    assert norms.is_rms_norm(norm) and not norms.is_rms_norm(torch.nn.LayerNorm(24))
    plain, found = norm(x), norms.rms_norm(norm, x)
    assert torch.equal(found, plain)
    one, other = (torch.autograd.grad(y, x, grad)[0] for y in (found, plain))
    torch.testing.assert_close(one, other)


def test_a_norm_of_another_formula_is_left_to_autograd():
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            return (1 + self.weight) * super().forward(hidden_states)

    assert not norms.is_rms_norm(Other(8))


@pytest.mark.parametrize("widened", [1, 100, 1 << 20])
def test_rows_widened_a_few_at_a_time_make_the_same_product(widened, monkeypatch):
    monkeypatch.setattr(products, "WIDENED", widened)
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24, dtype=torch.bfloat16, requires_grad=True)
    a = [torch.randn(rank, 24, requires_grad=True) for rank in (3, 1)]
    out = torch.cat(products.low_rank(x, a), dim=-1)
    wanted = x.float() @ torch.cat(a).T
    torch.testing.assert_close(out, wanted)
    weights = torch.randn_like(out)
    found, plain = (torch.autograd.grad((y * weights).sum(), [x, *a]) for y in (out, wanted))
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


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


def test_an_adapted_head_learns_from_label_positions():
    model = plain_model("smolvlm", target_modules=["lm_head", "model.text_model.layers.1.mlp.up_proj"])
    batch = tiny_batch("smolvlm", model.get_base_model())
    plain = step(model, batch)
    assert any("lm_head" in key for key in plain[1])
    with vqlora.lean_step(model):
        assert_same(plain, step(model, batch), 2e-4)


def test_a_head_held_in_16_bits_is_widened_in_blocks():
    torch.manual_seed(0)
    weight, x = torch.randn(1000, 64).bfloat16(), torch.randn(5, 64, requires_grad=True)
    weights, grad = weight.float(), torch.randn(5, 1000)
    for entries in (1, 64 * 7, 64 * 1000):
        x.grad = None
        out = held_product(x, weight, entries)
        out.backward(grad)
        torch.testing.assert_close(out, x @ weights.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, grad @ weights, rtol=1e-5, atol=1e-4)

    def product(entries):
        return step_bytes(lambda: held_product(x, weight, entries).sum().backward())

    assert product(64 * 50) < product(64 * 1000) - 64 * 900 * 4
    model = plain_model("smolvlm", "bf16", "fp32")
    with vqlora.lean_step(model):
        assert type(model.get_base_model().lm_head) is Linear16, "the model's head is one of these"


def test_other_methods_are_left_to_peft():
    base = tiny_model("smolvlm")
    targets = target_modules(base, ["text"], "attention")
    model = get_peft_model(base, AdaLoraConfig(total_step=9, init_r=4, target_modules=targets)).train()
    batch = tiny_batch("smolvlm", base)
    plain = step(model, batch)
    with vqlora.lean_step(model) as lean:
        assert_same(plain, step(model, batch), 2e-4)
    assert not lean.switches["adapters"].on and "8 left to peft" in lean.switches["adapters"].reason


def test_dropout_draws_what_it_drew():
    model = plain_model("smolvlm", lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = tiny_batch("smolvlm", model.get_base_model())
    torch.manual_seed(0)
    plain = step(model, batch)
    with vqlora.lean_step(model) as lean:
        assert not lean.switches["share"].on
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
