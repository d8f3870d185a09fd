"""Scores behind a cached prefix equal those of whole rows read from scratch, for each kind of model."""

import random

import pytest
import torch
from little_models import lively
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from vqlora import scoring
from vqlora.quantize import load_quantized
from vqlora.scoring import Item

TOKENS = [f"<{name}>" for name in ("pad", "bos", "eos", "image", "emb", "cap", "qst", "ans")]
PAD, BOS, EOS, IMAGE, EMB, CAP, QST, ANS = lively()[1].convert_tokens_to_ids(TOKENS)
FRAMES = 2
PREFIX = [BOS, *[IMAGE] * (4 * FRAMES), EMB]
KINDS = ("plain", "eager", "lora", "nf4", "nf4+lora", "prefix tuning")


def built(kind):
    model, _ = lively()
    if kind == "eager":
        model.model.language_model.set_attn_implementation("eager")
    if kind.startswith("nf4"):
        model = load_quantized(model, "nf4", compute_dtype="fp32")  # bfloat16: equal to its few digits
    if kind.endswith("lora"):
        where = ["q_proj", "down_proj", "fc1"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=where, init_lora_weights=False))
    if kind == "prefix tuning":
        model.config.update({"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 2})
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return model


def clips(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, FRAMES, 3, 64, 64, generator=rng) * 2 - 1
    return {"pixel_values": pixels, "frame_times": torch.linspace(0, 1, FRAMES).expand(count, FRAMES)}


def row(clip, k):
    return {name: value[k : k + 1] for name, value in clip.items()}


def some_items(rng, questions):
    def words(low, high):
        return tuple(rng.randrange(9, 19) for _ in range(rng.randint(low, high)))

    items = [Item((CAP,), tuple((*words(1, 6), EOS) for _ in range(3)))]
    for _ in range(questions):
        items.append(Item((QST, *words(2, 5), ANS), tuple(words(1, 3) for _ in range(4))))
    return items


def from_scratch(model, clip, item, branch):
    """(summed log-likelihood, hits) of one branch: the whole row, no cache, no packing, no padding."""
    ids = torch.tensor([[*PREFIX, *item.stem, *branch]])
    logits = model(input_ids=ids, **clip, use_cache=False).logits[0, -len(branch) - 1 : -1].float()
    target = torch.tensor(branch)
    logp = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
    return float(logp), int((logits.argmax(-1) == target).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_cached_scores_and_captions_equal_full_recomputation(kind):
    model, seen, rng = built(kind), clips(3), random.Random(0)
    rows = [some_items(rng, questions) for questions in (0, 1, 3)]
    with scoring.scoring_mode(model):
        cache, _ = scoring.encode(model, PREFIX, **seen)
        before = cache.get_seq_length()
        scores = scoring.score(model, cache, rows, PAD)
        assert cache.get_seq_length() == before
        for k, (items, found) in enumerate(zip(rows, scores, strict=True)):
            for item, branches in zip(items, found, strict=True):
                for branch, one in zip(item.branches, branches, strict=True):
                    logp, hits = from_scratch(model, row(seen, k), item, branch)
                    assert one.logp == pytest.approx(logp, abs=2e-4) and one.hits == hits
                    assert one.tokens == len(branch)
        stems = [(CAP,), (QST, 10, 11, ANS), (CAP,)]
        told = scoring.greedy(model, cache, stems, EOS, 8)
        for k, stem in enumerate(stems):
            assert told[k] == slow_greedy(model, row(seen, k), stem, 8)


def slow_greedy(model, clip, stem, limit):
    told = []
    while len(told) < limit:
        ids = torch.tensor([[*PREFIX, *stem, *told]])
        token = int(model(input_ids=ids, **clip, use_cache=False).logits[0, -1].argmax())
        if token == EOS:
            break
        told.append(token)
    return told


def test_some_captions_end_early_and_leave_the_batch():
    ended = 0
    for seed in range(3):
        model, seen = lively(seed)[0], clips(4, seed)
        with scoring.scoring_mode(model):
            cache, _ = scoring.encode(model, PREFIX, **seen)
            told = scoring.greedy(model, cache, [(CAP,)] * 4, EOS, 12)
            assert told == [slow_greedy(model, row(seen, k), (CAP,), 12) for k in range(4)]
        ended += sum(len(t) < 12 for t in told)
    assert 0 < ended < 12


def test_a_row_scores_the_same_alone_and_beside_longer_rows():
    model, seen, rng = lively()[0], clips(3), random.Random(1)
    rows = [some_items(rng, questions) for questions in (0, 5, 1)]
    with scoring.scoring_mode(model):
        cache, vectors = scoring.encode(model, PREFIX, **seen)
        together = scoring.score(model, cache, rows, PAD)
        for k in range(3):
            alone, vector = scoring.encode(model, PREFIX, **row(seen, k))
            assert torch.allclose(vector[0], vectors[k], atol=1e-5)
            for a, b in zip(scoring.score(model, alone, [rows[k]], PAD)[0], together[k], strict=True):
                assert [s.logp for s in a] == pytest.approx([s.logp for s in b], abs=2e-4)


def test_copied_rows_of_a_cache_answer_as_the_original_does():
    model, seen = lively()[0], clips(2)
    with scoring.scoring_mode(model):
        cache, _ = scoring.encode(model, PREFIX, **seen)
        stems = [(QST, 9, ANS), (QST, 12, 13, ANS), (CAP,)]
        told = scoring.greedy(model, scoring.rows_of(cache, [1, 1, 0]), stems, EOS, 6)
        assert cache.get_seq_length() == len(PREFIX) and cache.layers[0].keys.shape[0] == 2
    with torch.no_grad():
        expected = [slow_greedy(model, row(seen, k), s, 6) for k, s in zip((1, 1, 0), stems, strict=True)]
    assert told == expected


def test_text_vectors_do_not_depend_on_padding_or_batches():
    model, _ = lively()
    rows = [[BOS, *range(9, 9 + n), EMB] for n in (5, 1, 9, 3)]
    with scoring.scoring_mode(model):
        whole = scoring.embed_texts(model, rows, PAD)
        assert torch.allclose(whole, scoring.embed_texts(model, rows, PAD, batch_size=1), atol=1e-5)
        assert torch.allclose(whole.norm(dim=-1), torch.ones(4), atol=1e-5)
        assert not torch.allclose(whole[0], whole[2], atol=1e-2)


def test_modes_and_gradients_are_put_back():
    model = lively()[0].train()
    model.model.vision_tower.eval()
    with pytest.raises(KeyError), scoring.scoring_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and not model.model.vision_tower.training and torch.is_grad_enabled()


def test_an_item_without_stem_or_with_an_empty_branch_is_refused():
    for stem, branches in (((), ((1,),)), ((1,), ((1,), ()))):
        with pytest.raises(ValueError, match="stem and non-empty branches"):
            Item(stem, branches)
