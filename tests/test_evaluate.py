"""The evaluation as a whole: what it reports, and what it must not depend on."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from little_models import lively

from vqlora import metrics
from vqlora.base import tiny
from vqlora.data.batches import Layout
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, Question, TrueEvent
from vqlora.evaluate import NUMBER_COLUMNS, TEXT_COLUMNS, _judge, evaluate, metric_values
from vqlora.scoring import Score

NAMES, MOTIONS = ("cat", "dog"), ("left", "right", "spins")


def parse(caption):
    words = [word for word in caption.split() if word in (*NAMES, *MOTIONS)]
    return list(zip(words[::2], words[1::2], strict=False))


def letters():
    """Reference metrics by characters: they need no Java, and what is tested here is not the metrics."""
    return metrics.CaptionScorer("zh")


def clip(number, rng):
    one, two = (f"{rng.choice(NAMES)} moves {rng.choice(MOTIONS)}" for _ in range(2))
    questions = [Question("what", "what spins", ("cat", "dog", "one", "two"), int(rng.integers(4)))]
    if number % 2:
        questions.append(Question("order", "what moves then", ("cat", "cat moves", "dog then cat"), 1))
    captions = {"en": (f"{one} then {two}", one, f"{two} then what")}
    return Clip(f"clip-{number}", Path("x.mp4"), "val", captions, tuple(questions), events=())


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    clips = [clip(k, rng) for k in range(7)]
    return clips, [rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8) for _ in clips]


@pytest.fixture(scope="module")
def usual(data):
    return run(data)


def run(data, model=None, **options):
    clips, frames = data
    pair = model or lively()
    return evaluate(*pair, clips, ArrayStore(clips, frames), **{
        "frames": 2, "max_new_tokens": 8, "parser": parse, "scorer": letters(), **options})


def test_what_is_reported(data, usual, tmp_path):
    clips, _ = data
    expected = {"nll", "token_accuracy_frac", "slot_frac", "exact_frac", "order_frac", "rouge_l", "cider"}
    expected |= {"qa_frac", "qa_what_frac", "qa_order_frac", "clips", "clips_left_out"}
    expected |= {f"bleu{n}" for n in (1, 2, 3, 4)}
    for way in ("t2v", "v2t"):
        expected |= {f"{way}_{name}" for name in ("r1", "r5", "r10", "median_rank", "map")}
    assert set(usual.summary) == expected and all(isinstance(v, float) for v in usual.summary.values())
    rows = usual.examples
    assert tuple(rows.columns) == (*TEXT_COLUMNS, *NUMBER_COLUMNS) and rows["id"].is_unique
    assert rows["task"].value_counts().to_dict() == {"retrieval": 14, "question": 10, "caption": 7}
    assert set(rows["clip"]) == {clip.id for clip in clips}
    rows.to_parquet(tmp_path / "examples.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "examples.parquet"), rows)
    for column in TEXT_COLUMNS:
        assert all(isinstance(text, str) for text in rows[column])
    assert all(rows[column].dtype == float for column in NUMBER_COLUMNS)


def test_summary_is_the_mean_of_the_examples(usual):
    found = 0
    for name, value in usual.summary.items():
        if name.startswith(("bleu", "clips")) or name.endswith("median_rank"):
            with pytest.raises(ValueError, match="not a mean over examples; allowed: nll"):
                metric_values(usual.examples, name)
            continue
        found += 1
        assert metric_values(usual.examples, name)["value"].mean() == pytest.approx(value, nan_ok=True), name
    assert found == 18  # seven of captions, three of questions, eight of retrieval


def test_numbers_follow_from_the_models_own_loss(data, usual):
    """NLL of a reference, and the likeliest choice, from whole rows that nobody cached or packed."""
    clips, frames = data
    model, tokenizer = lively()
    layout = Layout(tokenizer)
    for clip, array in zip(clips[:2], frames, strict=False):
        shown = torch.from_numpy(array[[1, 4]]).permute(0, 3, 1, 2)[None] / 127.5 - 1
        seen = {"pixel_values": shown, "frame_times": torch.tensor([[1 / 5, 4 / 5]])}

        def nll(given, learned, seen=seen):
            ids = torch.tensor([[*layout.prefix(2), *given, *learned]])
            labels = torch.full_like(ids, -100)
            labels[0, -len(learned):] = torch.tensor(learned)
            with torch.no_grad():
                return float(model(ids, labels=labels, **seen).loss)

        rows = usual.examples[usual.examples["clip"] == clip.id].set_index("task")
        expected = np.mean([nll(*layout.caption(text)) for text in clip.captions["en"]])
        assert rows.loc["caption", "nll"] == pytest.approx(expected, abs=1e-4)
        for q, question in enumerate(clip.questions):
            answers = [layout.question(question.text, choice) for choice in question.choices]
            if q == 0:  # one-token choices are compared without <eos>
                answers = [(given, learned[:-1]) for given, learned in answers]
            sums = [nll(given, learned) * len(learned) for given, learned in answers]
            row = rows.loc[["question"]].iloc[q]
            assert row["prediction"] == question.choices[int(np.argmin(sums))]
            assert row["nll"] == pytest.approx(sums[question.answer], abs=1e-3)
            assert row["rank"] == 1 + sum(s < sums[question.answer] for s in sums)


@pytest.mark.parametrize(("batch_size", "held_bytes"), [(1, 0), (3, 0), (3, 2**28)])
def test_batches_do_not_matter(data, usual, batch_size, held_bytes, monkeypatch):
    monkeypatch.setattr(sys.modules["vqlora.evaluate"], "HELD_BYTES", held_bytes)
    found = run(data, batch_size=batch_size)
    pd.testing.assert_frame_equal(found.examples, usual.examples, check_exact=False, rtol=1e-4, atol=1e-5)


def test_the_order_of_clips_does_not_matter(data, usual):
    clips, frames = data
    order = [3, 0, 6, 2, 5, 1, 4]
    found = run(([clips[k] for k in order], [frames[k] for k in order]))
    assert found.summary == pytest.approx(usual.summary, rel=1e-4, nan_ok=True)
    a, b = (e.examples.sort_values("id").reset_index(drop=True) for e in (found, usual))
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-4, atol=1e-5)


def test_each_clip_is_encoded_once(data):
    model, tokenizer = lively()
    seen = []
    model.model.vision_tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run(data, (model, tokenizer), batch_size=3)
    assert seen == [6, 6, 2]


def test_the_model_is_left_as_it_was(data):
    model, tokenizer = lively()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    run(data, (model, tokenizer))
    assert model.training and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blind_models_see_another_clip(data, usual):
    clips, frames = data
    blind = run(data, blind=True)
    swapped = run((clips, frames[3:] + frames[:3]))
    pd.testing.assert_frame_equal(blind.examples, swapped.examples)
    assert blind.summary["nll"] != usual.summary["nll"]
    with pytest.raises(ValueError, match="needs at least 2 readable clips, got 1"):
        run((clips[:1], frames[:1]), blind=True)


def test_unreadable_clips_are_left_out_and_counted(data):
    clips, frames = data
    store = ArrayStore(clips[:5], frames[:5])
    pair, options = lively(), {"frames": 2, "max_new_tokens": 4, "parser": parse, "scorer": letters()}
    found = evaluate(*pair, clips, store, **options)
    assert (found.summary["clips"], found.summary["clips_left_out"]) == (5.0, 2.0)
    assert evaluate(*pair, clips[:3], store, **options).summary["clips_left_out"] == 0.0
    with pytest.raises(ValueError, match=r"at least 1 readable clips, got 0 \(2 left out\)"):
        evaluate(*pair, clips[5:], store, **options)


def test_a_missing_language_is_named(data):
    with pytest.raises(ValueError, match="clip 'clip-0' has no captions in language 'fr'; it has: en"):
        run(data, language="fr")


def test_questions_alone_need_no_captions_and_no_java(data, monkeypatch):
    monkeypatch.setattr(metrics, "find_java", lambda: pytest.fail("Java was asked for"))
    clips, frames = data
    bare = [Clip(c.id, c.path, c.part, {}, c.questions) for c in clips]
    found = run((bare, frames), scorer=None, parser=None)
    assert set(found.summary) == {"qa_frac", "qa_what_frac", "qa_order_frac", "clips", "clips_left_out"}
    assert set(found.examples["task"]) == {"question"}


def test_open_questions_are_answered_freely(data):
    clips, frames = data
    first = run(data).examples.query("task == 'question'")
    free = Question("what", "what spins", ("cat",), 0)
    opened = [Clip(c.id, c.path, c.part, {}, (free, *c.questions)) for c in clips]
    found = run((opened, frames), scorer=None, parser=None).examples
    is_free = found["id"].str.endswith("question-0")
    assert list(found[~is_free]["prediction"]) == list(first["prediction"])
    answers = found[is_free]["prediction"]
    assert answers.nunique() > 1 and (found[is_free]["correct"] == (answers == "cat")).all()


def test_ties_and_nan_count_as_wrong_answers():
    question = Question("what", "what spins", ("cat", "dog", "one"), 0)
    assert _judge(question, [Score(-1.0, 0, 1), Score(-1.0, 0, 1), Score(-2.0, 0, 1)], None) == (2.0, "dog")
    assert _judge(question, [Score(-1.0, 0, 1), Score(-2.0, 0, 1), Score(-3.0, 0, 1)], None) == (1.0, "cat")
    assert _judge(question, [Score(math.nan, 0, 1)] * 3, None)[0] == 3.0
    open_question = Question("what", "what spins", ("Cat",), 0)
    assert _judge(open_question, [], "cat") == (1.0, "cat")
    assert math.isnan(_judge(open_question, [], "dog")[0])


def test_a_model_that_has_diverged_gets_no_credit(data):
    model, tokenizer = lively()
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(math.nan)
    found = run(data, (model, tokenizer))
    assert found.summary["qa_frac"] == found.summary["t2v_r1"] == found.summary["token_accuracy_frac"] == 0.0
    assert math.isnan(found.summary["nll"])
    with pytest.raises(ValueError, match="metric 'nll' has no value for clip 'clip-0' \\(7 such\\)"):
        metric_values(found.examples, "nll")


def test_rendered_clips_are_parsed_by_their_own_language():
    from vqlora.data.kinemoji.language import vocabulary

    model, tokenizer = tiny(words=vocabulary())
    event = TrueEvent("cat", "left", 3, 8)
    captions = {"en": ("the cat moves left",)}
    clips = [Clip(f"c{k}", Path("x"), "val", captions, events=(event,)) for k in range(2)]
    frames = [np.zeros((4, 64, 64, 3), np.uint8)] * 2
    assert 0 <= run((clips, frames), (model, tokenizer), parser=None).summary["slot_frac"] <= 1
    real = [Clip(c.id, c.path, c.part, c.captions) for c in clips]
    assert "slot_frac" not in run((real, frames), (model, tokenizer), parser=None).summary
