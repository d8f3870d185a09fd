"""DoRA, Houlsby adapters, prefix tuning, post-training quantization: each against its definition."""

import copy
import math

import numpy as np
import pytest
import torch
from little_models import lively
from peft import get_peft_model
from settings_like import settings_like, tiny_smolvlm
from test_train import clips

from vqlora import scoring
from vqlora.adapter.merge import merge
from vqlora.arms import houlsby, prefix
from vqlora.base import tiny
from vqlora.baselines import attach, callbacks, finish, prepare, ranks, trainable_report
from vqlora.card import _what
from vqlora.checkpoints import last_whole_checkpoint
from vqlora.data.batches import ClipDataset, Collator, Layout
from vqlora.losses import batch_loss
from vqlora.naming import describe_model, load_model, save_model
from vqlora.quantize import load_quantized
from vqlora.train import first_batches, train

WORDS = torch.tensor([9, 10, 11])  # of tiny's vocabulary
PAIRS = [("dora", "nf4"), ("houlsby", "nf4"), ("prefix", "nf4"), ("posttrain", "int8")]


def started(arm, bits="nf4", **overrides):
    """(model with the arm on it, settings, data, collator)"""
    settings = settings_like(arm, bits, **overrides)
    model, tokenizer = tiny()
    data = ClipDataset(*clips(), settings.frames, seed=settings.seed)
    collator = Collator(tokenizer, seed=settings.seed)
    batches = lambda: first_batches(data, collator, settings, "cpu", count=2)  # noqa: E731
    return attach(prepare(model, settings), settings, batches), settings, data, collator


def trained(model, settings, data, collator, work):
    given = train(model, settings, data, collator, work, save_steps=2)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, given


@pytest.mark.parametrize("arm, bits", PAIRS)
def test_an_arm_learns_and_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, arm, bits):
    made = started(arm, bits, steps=3)
    first = {name: p.detach().clone() for name, p in made[0].named_parameters() if p.requires_grad}
    whole, given = trained(*made, tmp_path)
    assert whole.keys() == first.keys() and any(not torch.equal(whole[n], p) for n, p in first.items())
    (tmp_path / "checkpoints/checkpoint-3/complete.json").unlink()
    assert last_whole_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    resumed, again = trained(*started(arm, bits, steps=3), tmp_path)
    assert again["steps_here"] == 1 and again["train_loss"] == given["train_loss"]
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


@pytest.mark.parametrize("arm, bits, name, kind", [
    ("dora", "nf4", "DoRA4_QLORA_w4", "DoRA adapters (rank 4)"),
    ("houlsby", "int8", "Houlsby4_QLORA_w8", "Houlsby adapters (width 4)"),
    ("prefix", "bf16", "Prefix4_LORA_w16", "Prefix adapters (positions: 4)"),
    ("posttrain", "nf4", "None_PTQ_w4", "Full fine-tuning, quantized only afterwards, of Tiny"),
])  # fmt: skip
def test_a_saved_model_says_what_it_is_and_comes_back_as_it_was(tmp_path, arm, bits, name, kind):
    model, settings, data, collator = started(arm, bits)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model, _ = finish(model, settings)
    tiny()[0].save_pretrained(tmp_path / "base")
    collator.layout.tokenizer.save_pretrained(tmp_path / "base")
    named = describe_model(model, "Tiny", "clips", base_source=str(tmp_path / "base"))
    assert kind in _what(named, settings.model_dump())
    assert f"_{name}_" in named.name and named.bits == bits
    again, _ = load_model(save_model(model, tmp_path, named, collator.layout.tokenizer))
    batch = collator([data[0], data[1]])
    with scoring.scoring_mode(model), scoring.scoring_mode(again):
        assert torch.equal(batch_loss(model, batch, 0.5)[0], batch_loss(again, batch, 0.5)[0])


@pytest.mark.parametrize("arm", ["dora", "houlsby", "prefix"])
def test_trainable_parameters_are_those_of_the_arm(arm):
    model, *_ = started(arm)
    base = tiny()[0]
    text = base.config.text_config
    wanted = {
        "dora": sum(4 * (m.in_features + m.out_features) + m.out_features
                    for m in map(base.get_submodule, prefix_free_targets(base))),
        "houlsby": 2 * 4 * (2 * 4 * 64 + 64 + 4),  # two a block, four blocks of width 64
        "prefix": 4 * 2 * text.num_hidden_layers * text.hidden_size,
    }[arm]  # fmt: skip
    report = trainable_report(model)
    assert report["trainable"] == wanted and report["base"] == sum(p.numel() for p in base.parameters())
    assert ranks(model, settings_like(arm)) == {} and callbacks(model, settings_like(arm)) == []
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def prefix_free_targets(base):
    from vqlora.modalities import target_modules

    return target_modules(base)


# -- Houlsby adapters


def by_the_equation(h, layer):
    """h + W_up gelu(W_down h + b_down) + b_up (Houlsby et al. 2019, section 2.1), written out in numpy."""
    p = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    low = h.double().numpy() @ p["down"].T + p["down_bias"]
    low = 0.5 * low * (1 + np.vectorize(math.erf)(low / math.sqrt(2)))
    return torch.from_numpy(h.double().numpy() + low @ p["up"].T + p["up_bias"]).float()


def test_houlsby_adapters_are_the_papers_equation_where_the_paper_puts_them():
    model, *_ = started("houlsby", "bf16", modalities=("vision",), compute_dtype="fp32")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    block = model.get_base_model().model.vision_tower.layers[1]
    first, second = block.self_attn.o_proj, block.mlp.fc2
    x, plain = torch.randn(3, 5, 64), copy.deepcopy(block)
    plain.self_attn.o_proj, plain.mlp.fc2 = first.base_layer, second.base_layer
    with torch.no_grad():
        wanted = x + by_the_equation(plain.self_attn(plain.norm1(x)), first.houlsby_bottleneck.default)
        wanted = wanted + by_the_equation(plain.mlp(plain.norm2(wanted)), second.houlsby_bottleneck.default)
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-4)
        assert (block(x) - plain(x)).abs().max() > 1


@pytest.mark.parametrize("parts, count", [(("vision",), 4), (("text", "fusion"), 4), (("vision", "text"), 8)])
def test_houlsby_adapters_are_two_a_block_of_the_parts_asked_for_and_start_as_the_base(parts, count):
    model, *_ = started("houlsby", modalities=parts)
    modules = model.get_base_model().named_modules()
    names = [name for name, module in modules if isinstance(module, houlsby.HoulsbyLayer)]
    assert len(names) == count and {("vision_tower" in name, "language_model" in name) for name in names} == {
        ("vision" == part, "text" == part) for part in parts if part != "fusion"}  # fmt: skip
    ids = torch.tensor([[1, 4, 4, 4, 4, 5, 9, 10]])
    shown = {"input_ids": ids, "pixel_values": torch.rand(1, 1, 3, 64, 64)}
    assert torch.equal(model(**shown).logits, load_quantized(tiny()[0], "nf4")(**shown).logits)


def test_houlsby_adapters_find_the_blocks_of_other_classes_or_say_so():
    assert len(houlsby.block_ends(tiny_smolvlm(), ("vision", "text"))) == 2 * 3
    model = attach(load_quantized(tiny_smolvlm(), "nf4"), settings_like("houlsby"))
    ids = torch.tensor([[1, 9, 10, 11]])
    with model.disable_adapter():
        before = model(input_ids=ids).logits
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    learned = [name for name, p in model.named_parameters() if name.endswith(".up") and p.grad is not None]
    assert torch.equal(out.logits, before) and len(learned) == 4 and all("text_model" in n for n in learned)
    with pytest.raises(ValueError, match="modalities: none has transformer blocks"):
        started("houlsby", modalities=("fusion",))
    model = tiny_smolvlm()
    for layer in model.model.text_model.layers:
        layer.mlp.final = layer.mlp.__dict__["_modules"].pop("down_proj")
    with pytest.raises(ValueError, match="does not know the transformer blocks of text in 'smolvlm'"):
        houlsby.block_ends(model, ("text",))


@pytest.mark.parametrize("arm, why", [("dora", "more than a low-rank"), ("houlsby", "not a low-rank update")])
def test_what_is_no_low_rank_update_cannot_be_merged(arm, why):
    model, *_ = started(arm)
    with pytest.raises(ValueError, match=why):
        merge(model)
    if arm == "houlsby":
        with pytest.raises(ValueError, match="nonlinearity"):
            model.merge_and_unload()


# -- prefix tuning


def prefixed():
    """(model whose prefix is what the decoder makes of WORDS, the same model without a prefix, tokenizer)

    With such a prefix every output has to be that of the plain model on rows that begin with WORDS.
    """
    plain, tokenizer = lively()
    settings = settings_like("prefix", "bf16", rank=len(WORDS))
    batches = lambda: [{"input_ids": WORDS[None], "labels": WORDS[None]}]  # noqa: E731
    model = copy.deepcopy(plain)  # in float32, so that nothing is rounded
    wrapped = get_peft_model(model, prefix.configure(model, settings, batches))
    prefix.begin(wrapped, settings, batches)
    return wrapped.eval(), plain, tokenizer


def behind(words, batch, key, value):
    return torch.cat([words.new_full((len(batch[key]), len(words)), value), batch[key]], dim=1)


def test_training_sees_the_prefix_before_the_rows_and_at_its_own_positions():
    model, plain, tokenizer = prefixed()
    data = ClipDataset(*clips(), 2)
    batch = dict(Collator(tokenizer)([data[i] for i in range(4)]))
    assert not batch["attention_mask"].all(), "rows of several lengths"
    moved = dict(batch)
    for ids, mask in (("input_ids", "attention_mask"), ("text_ids", "text_mask")):
        moved[ids] = torch.cat([WORDS.expand(len(batch[ids]), -1), batch[ids]], dim=1)
        moved[mask] = behind(WORDS, batch, mask, 1)
    moved["labels"] = behind(WORDS, batch, "labels", -100)
    for weight in (0.0, 0.5):
        found, wanted = batch_loss(model, batch, weight)[0], batch_loss(plain, moved, weight)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (found - batch_loss(plain, batch, weight)[0]).abs() > 0.01


def test_evaluation_sees_the_same_prefix_once_behind_the_cache_and_in_every_decoded_token():
    model, plain, tokenizer = prefixed()
    layout, data = Layout(tokenizer), ClipDataset(*clips(), 2)
    item = data[0]
    shown = Collator(tokenizer)([item])
    shown = {name: shown[name] for name in ("pixel_values", "frame_times")}
    given, learned = layout.caption("cat moves left")
    head = layout.prefix(2)
    with scoring.scoring_mode(model), scoring.scoring_mode(plain):
        cache, vector = scoring.encode(model, head, **shown)
        asked = scoring.Item(tuple(given), (tuple(learned),))
        [[[score]]] = scoring.score(model, cache, [[asked]], layout.pad)
        row = torch.tensor([[*WORDS.tolist(), *head, *given, *learned]])
        out = plain(input_ids=row, **shown)
        logp = torch.log_softmax(out.logits[0, -len(learned) - 1 : -1], -1)
        wanted = float(logp[range(len(learned)), learned].sum())
        assert score.logp == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(vector, plain.embed(out.last_hidden_state, row), rtol=1e-4, atol=1e-5)
        [told] = scoring.greedy(model, cache, [given], layout.eos, 5)
        for _ in range(5):
            row = row[:, : -len(learned)] if _ == 0 else row
            row = torch.cat([row, plain(input_ids=row, **shown).logits[:, -1:].argmax(-1)], dim=1)
        assert told == row[0, -5:].tolist()[: len(told)] and told
        asked = torch.tensor([head + given])
        said = model.generate(input_ids=asked, **shown, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert said[0, asked.shape[1] :].tolist()[: len(told)] == told
        [text] = scoring.embed_texts(model, [layout.text("dog spins")], layout.pad)
        row = torch.tensor([[*WORDS.tolist(), *layout.text("dog spins")]])
        own = plain.embed(plain(input_ids=row).last_hidden_state, row)[0]
        torch.testing.assert_close(text, own, rtol=1e-4, atol=1e-5)


def test_a_prefix_starts_from_the_words_that_are_learned_first():
    model, settings, data, collator = started("prefix", rank=40)  # more than two batches teach
    batches = first_batches(data, collator, settings, "cpu", count=2)
    words = torch.cat([batch["input_ids"][batch["labels"] != -100] for batch in batches])
    assert len(words) < 40
    wanted = prefix.keys_and_values(load_quantized(tiny()[0], "nf4"), words.repeat(5)[:40])
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, wanted)


# -- post-training quantization


@pytest.mark.parametrize("bits, compute", [("nf4", "fp32"), ("int8", "bf16")])
def test_posttrain_is_full_fine_tuning_put_into_bits_afterwards(tmp_path, bits, compute):
    how = {"compute_dtype": compute, "steps": 1, "warmup_steps": 0}
    full, _ = trained(*(found := started("full", "bf16", **how)), tmp_path / "full")
    late, _ = trained(*(other := started("posttrain", bits, **how)), tmp_path / "late")
    assert all(torch.equal(full[name], value) for name, value in late.items())
    model, costs = finish(other[0], other[1])
    fresh = tiny()[0]
    fresh.load_state_dict(found[0].state_dict())
    wanted = load_quantized(fresh, bits, compute_dtype=compute)
    batch = found[3]([found[2][0], found[2][1]])
    with scoring.scoring_mode(model), scoring.scoring_mode(wanted):
        assert torch.equal(batch_loss(model, batch, 0.5)[0], batch_loss(wanted, batch, 0.5)[0])
    assert not any(p.requires_grad for p in model.parameters()) and model.vqlora_precision.bits == bits
    assert 0 < costs["quantized_bytes"] < 0.6 * sum(4 * p.numel() for p in full.values())


# -- what an arm does not support


@pytest.mark.parametrize("settings, message", [
    ({"arm": "dora", "bits": "int8"}, "bits: 'int8' does not go with arm 'dora'; allowed: nf4, fp4, bf16"),
    ({"arm": "posttrain", "bits": "bf16"}, "bits: 'bf16' does not go with arm 'posttrain'"),
    ({"arm": "houlsby", "layers": "attention"}, "layers: 'attention' does not go with arm 'houlsby'"),
    ({"arm": "houlsby", "dropout": 0.1}, "dropout: 0.1 does not go with arm 'houlsby'; allowed: 0.0"),
    ({"arm": "prefix", "rslora": True}, "rslora: True does not go with arm 'prefix'"),
    ({"arm": "prefix", "gradient_checkpointing": True}, "gradient_checkpointing: True does not go with"),
])  # fmt: skip
def test_settings_that_an_arm_could_only_pass_over_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings_like(**settings)


def test_prefixes_go_with_the_embedded_base_its_text_and_batches_alone():
    settings = settings_like("prefix", "bf16", rank=2)
    with pytest.raises(ValueError, match="'prefix' does not go with model type 'smolvlm'"):
        prefix.configure(tiny_smolvlm(), settings, list)
    with pytest.raises(ValueError, match="lacks 'text'"):
        started("prefix", modalities=("vision",))
    with pytest.raises(ValueError, match="none are given"):
        attach(load_quantized(tiny()[0], "bf16"), settings)
