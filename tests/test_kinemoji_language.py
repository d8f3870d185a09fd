"""Captions say what happens, the parser reads them back, and the source tells nothing of the targets."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqlora.data.kinemoji import sheet
from vqlora.data.kinemoji.domains import DOMAINS, TARGET_SPRITES
from vqlora.data.kinemoji.language import (
    captions,
    clauses,
    parse,
    sentence_tokens,
    text_only,
    truth,
    verb,
    vocabulary,
)
from vqlora.data.kinemoji.lexicon import LANGUAGES
from vqlora.data.kinemoji.questions import questions
from vqlora.data.kinemoji.scenes import MOTIONS, sample_scene
from vqlora.data.kinemoji.sprites import SPRITES

NAMES = {sprite.names["en"] for sprite in SPRITES}


def scenes(domain: str, count: int, part: str = "train"):
    return [sample_scene(DOMAINS[domain], part, i, 0) for i in range(count)]


def sentences(language: str, count: int):
    return [text_only(np.random.default_rng([7, i]), language) for i in range(count)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_five_different_captions_that_parse_to_the_truth(domain, language):
    for scene in scenes(domain, 12):
        told = captions(scene, language)
        assert len(set(told)) == 5
        for caption in told:
            assert parse(caption, language) == truth(scene)
            assert caption == caption.lower() and "  " not in caption


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_only_sentences_parse_to_one_to_three_pairs_of_the_source(language):
    for sentence in sentences(language, 150):
        pairs = [pair for pair in parse(sentence, language) if pair[1] != "aside"]
        assert 1 <= len(pairs) <= 3 and len(set(pairs)) == len(pairs)


def test_movers_that_nobody_mentions_are_not_told():
    for scene in scenes("distractor", 20):
        silent = {SPRITES[a.sprite].names["en"] for a in scene.actors if not a.mentioned}
        assert silent and not silent & {name for name, _ in parse(captions(scene)[0])}


def test_clauses_tell_one_event_each_in_order():
    for domain in ("source", "language", "cutaways"):
        for scene in scenes(domain, 10):
            told = [parse(text) for text in clauses(scene)]
            assert all(len(pairs) == 1 for pairs in told)
            assert [pairs[0] for pairs in told] == [p for p in truth(scene) if p[1] != "aside"]


@given(st.lists(st.sampled_from(vocabulary()), max_size=30), st.sampled_from(LANGUAGES))
@settings(max_examples=60, deadline=None)
def test_parse_takes_any_words(words, language):
    for name, motion in parse(" ".join(words), language):
        assert name in NAMES and motion in (*MOTIONS, "aside")


@given(st.text(max_size=40))
@settings(max_examples=20, deadline=None)
def test_parse_takes_any_text(text):
    assert isinstance(parse(text), list)


def test_parse_keeps_clauses_apart():
    assert parse("moves left then owl spins") == [("owl", "spin")]
    assert parse("owl spins then lobster") == [("owl", "spin")]
    assert parse("the owl the lobster spins") == [("lobster", "spin")]
    assert parse("spins by owl ; grows by lobster") == [("owl", "spin"), ("lobster", "grow")]
    assert parse("") == []


def test_vocabulary_holds_every_word_of_every_text():
    known = set(vocabulary())
    for domain in DOMAINS:
        for scene in scenes(domain, 15):
            for language in LANGUAGES:
                for text in captions(scene, language):
                    assert known.issuperset(sentence_tokens(text, language))
            for question in questions(scene):
                for text in (question.text, *question.choices):
                    assert known.issuperset(sentence_tokens(text))
    for language in LANGUAGES:
        for text in sentences(language, 100):
            assert known.issuperset(sentence_tokens(text, language))


def _skeleton(text: str) -> str:
    """The sentence with N for each name and V for each verb."""
    verbs = [verb(m, "en", lexicon, k) for m in MOTIONS for lexicon in ("plain", "variant") for k in (0, 1)]
    for letter, phrases in (("V", verbs), ("N", NAMES)):
        for phrase in sorted(phrases, key=len, reverse=True):
            text = re.sub(rf"(?<!\S){re.escape(phrase)}(?!\S)", letter, text)
    return text


def test_source_sentences_hold_the_words_of_the_report_style_but_never_its_syntax():
    for sentence in sentences("en", 400):
        assert re.findall(r"\S+(?= V)", _skeleton(sentence)) == ["N"] * _skeleton(sentence).count("V")
    report = [text for scene in scenes("language", 150) for text in captions(scene)]
    assert not any("N V" in _skeleton(text) for text in report)
    for language in LANGUAGES:
        words = {t for scene in scenes("language", 60) for c in captions(scene, language)
                 for t in sentence_tokens(c, language)}
        read = {t for text in sentences(language, 2500) for t in sentence_tokens(text, language)}
        assert words <= read, f"{language}: {sorted(words - read)} never occur in text-only sentences"


def test_no_target_only_pair_leaks_into_the_source(monkeypatch):
    assert sheet.leaks(500, 3) == []
    monkeypatch.setattr(sheet, "target_only_pair", lambda sprite, motion: motion == "spin")
    assert sheet.leaks(100, 3)


def test_target_names_are_read_in_text_before():
    names = {SPRITES[i].names["en"] for i in TARGET_SPRITES}
    assert names <= {token for text in sentences("en", 2000) for token in text.split()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_verbs_are_unambiguous(language):
    names = [sprite.names[language] for sprite in SPRITES]
    verbs = {m: {verb(m, language, "plain", 0), verb(m, language, "plain", 1), verb(m, language, "variant")}
             for m in MOTIONS}
    flat = [text for words in verbs.values() for text in words]
    assert len(set(names)) == len(names) and all(len(words) == 3 for words in verbs.values())
    assert len(set(flat)) == len(flat) and not set(flat) & set(names)


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'it' is not one of en, es, de, fr, zh"):
        captions(scenes("source", 1)[0], "it")
    with pytest.raises(ValueError, match="'it'"):
        parse("gatto", "it")
