"""The adapter in training, under checkpointing, in 4 and 8 bits, in generation and behind caches."""

import copy

import peft
import pytest
import torch
from little_adapters import adapted, batch, gradients, stir, table, without_labels
from transformers import Trainer, TrainingArguments

import vqlora
from vqlora.adapter import gated_layers, join_rows, take_rows
from vqlora.optimizer import create_optimizer, is_gate
from vqlora.zoo import tiny_model

# Training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["kinevlm", "smolvlm"])
def test_checkpointing_gives_the_same_gradients_for_two_forwards_before_one_backward(name, reentrant):
    found = []
    for checkpointing in (False, True):
        model = stir(adapted(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**batch(name)).loss + 2 * model(**batch(name, seed=5)).loss
        loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-5)


class Batches(torch.utils.data.Dataset):
    def __init__(self, count):
        self.examples = [{k: v[0] for k, v in batch(clips=1, seed=i).items()} for i in range(count)]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def trained(folder, steps=4, resume=None, **settings):
    model = adapted(lora_dropout=0.1, **settings)
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    optimizer = create_optimizer(model, lr=1e-2, gate_lr=5e-2)
    trainer = Trainer(model, arguments, train_dataset=Batches(8), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_a_resumed_training_ends_bit_for_bit_as_an_unbroken_one(tmp_path):
    whole, trainer = trained(tmp_path / "a", control="shuffled")
    again, _ = trained(tmp_path / "b", control="shuffled", resume=str(tmp_path / "a" / "checkpoint-2"))
    weights = dict(again.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in whole.named_parameters())
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"adapter": 1e-2, "gate": 5e-2}
    start = dict(adapted().named_parameters())
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, start[name])}
    assert moved >= {name for name in start if is_gate(name)}


def test_the_optimizer_has_gates_in_a_group_of_their_own():
    model = adapted()
    how = {"weight_decay": 0.1, "optimizer_cls": torch.optim.AdamW, "betas": (0.8, 0.9)}
    optimizer = create_optimizer(model, lr=0.01, **how)
    adapter, gate = optimizer.param_groups
    assert (adapter["lr"], gate["lr"]) == (0.01, 0.05)
    assert (adapter["weight_decay"], gate["weight_decay"]) == (0.1, 0)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == sum(p.requires_grad for p in model.parameters()) and gate["betas"] == (0.8, 0.9)
    assert len(create_optimizer(adapted(gate="none"), lr=0.01).param_groups) == 1
    with pytest.raises(ValueError, match="no parameter is trainable"):
        create_optimizer(tiny_model("kinevlm").requires_grad_(False), lr=0.01)
    with pytest.raises(ValueError, match="gate_lr: 0"):
        create_optimizer(model, lr=0.01, gate_lr=0)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantized_bases_train_with_dropout_and_rank_stabilised_scaling(bits):
    model = vqlora.load_quantized(tiny_model("kinevlm"), bits, device="cpu", compute_dtype="fp32")
    config = vqlora.VQLoraConfig(ranks=4, lora_dropout=0.1, use_rslora=True, lora_alpha=6)
    model = stir(peft.get_peft_model(model, config)).train()
    assert {layer.scaling["default"] for _, layer in gated_layers(model)} == {3.0}
    model(**batch()).loss.backward()
    found = gradients(model)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert all(grad.any() for grad in found.values())


def test_adapters_in_bfloat16_and_under_autocast():
    model = tiny_model("kinevlm").to(torch.bfloat16)
    model = peft.get_peft_model(model, vqlora.VQLoraConfig(ranks=4), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_A" in n} == {torch.bfloat16}
    stir(model)(**batch()).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    model = stir(adapted())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = table(model, **batch())
    assert torch.equal(gates, table(model, **batch()))  # gates stay exact


# Generation


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["kinevlm", "smolvlm", "idefics", "qwen2_5_vl"])
def test_generating_with_a_cache_gives_the_scores_of_generating_without(name, beams):
    model, inputs = stir(adapted(name)).eval(), without_labels(batch(name))
    how = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_scores": True}
    fast, slow = (model.generate(**inputs, **how, use_cache=cached) for cached in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    for a, b in zip(fast.scores, slow.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_generation_takes_scores_and_repeats_them_for_beams():
    model = stir(adapted("smolvlm", features="scores", feature_names=("a",))).eval()
    inputs, f = without_labels(batch("smolvlm")), torch.tensor([[[2.0], [0.0], [-2.0]]] * 2)
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    given = model.generate(**inputs, **how, frame_features=f)
    with vqlora.frame_features(model, f):
        assert torch.equal(model.generate(**inputs, **how), given)
    with pytest.raises(ValueError, match="the batch has none"):
        model.generate(**inputs, **how)


@torch.no_grad()
def test_a_cache_keeps_the_frames_of_its_rows_when_they_are_cut_and_joined():
    model, inputs = stir(adapted()).eval(), without_labels(batch(clips=3))
    ids = torch.tensor([[20]] * 3)
    logits = model(**{**inputs, **longer(inputs, ids)}).logits[:, -1]
    cut = model(**inputs, use_cache=True).past_key_values
    take_rows(cut, [2, 0])
    two = model(input_ids=ids[:2], past_key_values=copy.deepcopy(cut)).logits[:, -1]
    torch.testing.assert_close(two, logits[[2, 0]], rtol=0, atol=1e-4)
    single = model(**{key: value[1:2] for key, value in inputs.items()}, use_cache=True).past_key_values
    join_rows([cut, single], into=cut)
    for layer, other in zip(cut.layers, single.layers, strict=True):
        layer.keys = torch.cat([layer.keys, other.keys])
        layer.values = torch.cat([layer.values, other.values])
    joined = model(input_ids=ids, past_key_values=cut).logits[:, -1]
    torch.testing.assert_close(joined, logits[[2, 0, 1]], rtol=0, atol=1e-4)


def longer(inputs, ids):
    whole = torch.cat([inputs["input_ids"], ids], dim=1)
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


def test_a_cache_of_unknown_frames_is_refused():
    model, inputs = stir(adapted()).eval(), without_labels(batch())
    with model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="frames behind this key/value cache are unknown"):
        model(input_ids=torch.tensor([[20]] * 2), past_key_values=cache)
