"""The lean step has the gradients of the plain one: per class, bits, gates, checkpointing, accumulation."""

import pytest
import torch
from little_steps import assert_same, checkpointed, plain_model, step
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import vqlora
from vqlora.quantize import load_quantized
from vqlora.zoo import ZOO, tiny_batch, tiny_model


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
