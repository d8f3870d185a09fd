"""Questions have exactly one right answer, and reading them alone does not give it away."""

from collections import Counter

import numpy as np
import pytest

from vqlora.data.clips import Question
from vqlora.data.kinemoji.domains import DIRECTIONS, DOMAINS
from vqlora.data.kinemoji.guess import text_only_guess
from vqlora.data.kinemoji.lexicon import NUMBERS, TIMES, VARIANTS, VERBS
from vqlora.data.kinemoji.questions import MOTION_KINDS, STILL_KINDS, questions
from vqlora.data.kinemoji.scenes import CELLS, sample_scene
from vqlora.data.kinemoji.sprites import SPRITES


def scenes(domain: str, count: int, part: str = "train"):
    return [sample_scene(DOMAINS[domain], part, i, 1) for i in range(count)]


def _name(sprite: int) -> str:
    return SPRITES[sprite].names["en"]


def _right(scene, question: Question) -> set[str]:
    """The choices that are right, worked out from the scene without the module under test."""
    told = [e for e in scene.events if scene.actors[e.actor].mentioned]
    mover = {id(e): _name(scene.actors[e.actor].sprite) for e in told}
    actors = [a for a in scene.actors if a.mentioned]
    text = question.text
    asked_name = next((w for w in text.split() if w in {_name(a.sprite) for a in actors}), None)
    if question.kind == "what":
        words = text.removeprefix("what ").removesuffix(" ?")
        motion = next(m for m in VERBS["en"] if words in (*VERBS["en"][m], VARIANTS["en"][m]))
        return {mover[id(e)] for e in told if e.motion == motion}
    if question.kind == "direction":
        return {e.motion for e in told if mover[id(e)] == asked_name and e.motion in DIRECTIONS}
    if question.kind == "order":
        return {mover[id(told[0 if "first" in text else -1])]}
    if question.kind == "count":
        return {NUMBERS[len(told) - 1]}
    if question.kind == "where":
        return {CELLS[a.cell] for a in actors if _name(a.sprite) == asked_name}
    if question.kind == "when":
        event = next(e for e in told if mover[id(e)] == asked_name)
        share = (event.start - 1) / (scene.frames - 1 - (event.end - event.start))
        return {TIMES[int(3 * share)]}
    if question.kind == "still":
        return {_name(a.sprite) for a in actors if a.shot == 0 and CELLS[a.cell] in text}
    if question.kind == "aside":
        return {_name(scene.aside)}
    if question.kind == "objects":
        return {NUMBERS[len(actors) - 1]}
    cast = {_name(a.sprite) for a in scene.actors}
    return cast if question.kind == "shown" else set(question.choices) - cast


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_question_has_exactly_one_right_choice(domain):
    for scene in scenes(domain, 120):
        asked = questions(scene)
        assert asked == questions(scene)
        assert len({q.kind for q in asked}) == len(asked) <= 6
        for question in asked:
            assert 2 <= len(set(question.choices)) == len(question.choices) <= 4
            right = _right(scene, question)
            found = [choice for choice in question.choices if choice in right]
            assert found == [question.choices[question.answer]], question


def test_clips_are_asked_at_least_five_kinds_nearly_always():
    for domain in DOMAINS:
        counts = Counter(len(questions(scene)) for scene in scenes(domain, 150))
        least = 3 if DOMAINS[domain].movers else 5
        assert sum(n for k, n in counts.items() if k >= least) >= 0.95 * 150, (domain, counts)
        assert min(counts) >= (2 if DOMAINS[domain].movers else 4)


def test_the_distractor_domain_asks_only_what_a_still_frame_shows():
    kinds = {q.kind for scene in scenes("distractor", 60) for q in questions(scene)}
    assert kinds == set(STILL_KINDS)
    kinds = {q.kind for scene in scenes("cutaways", 60) for q in questions(scene)}
    assert kinds == set(MOTION_KINDS)


def test_questions_of_the_language_domain_use_its_verbs():
    texts = {q.text for scene in scenes("language", 80) for q in questions(scene) if q.kind == "what"}
    assert texts <= {f"what {verb} ?" for verb in VARIANTS["en"].values()}


def test_the_right_choice_stands_anywhere():
    asked = [q for scene in scenes("source", 300) for q in questions(scene) if len(q.choices) == 4]
    shares = np.bincount([q.answer for q in asked], minlength=4) / len(asked)
    assert np.all(np.abs(shares - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(asked)))


@pytest.mark.parametrize("domain", ["source", "language", "distractor"])
def test_text_alone_does_not_give_answers_away(domain):
    train = [q for scene in scenes(domain, 500) for q in questions(scene)]
    test = [q for scene in scenes(domain, 500, "val") for q in questions(scene)]
    table = text_only_guess(train, test).set_index("kind")
    assert table.over_chance_frac["all"] < 0.03 + 2 * table.error_frac["all"], table
    assert table.questions["all"] == len(test)


@pytest.mark.parametrize("leak", ["prior", "position", "word", "odd one out"])
def test_the_guesser_finds_a_leak(leak):
    rng = np.random.default_rng(0)
    names = [f"n{i}" for i in range(12)]
    asked = []
    for _ in range(600):
        choices = [names[i] for i in rng.choice(12, 4, replace=False)]
        answer, text = int(rng.integers(4)), "what spins ?"
        if leak == "prior" and "n0" in choices:
            answer = choices.index("n0")
        elif leak == "position":
            answer = 2
        elif leak == "word":
            text = f"is it near {choices[answer]} ?"
        elif leak == "odd one out":  # three of one family and one of the other, which is right
            family = rng.integers(2)
            choices = [names[i] for i in rng.choice(6, 4, replace=False) + 6 * family]
            choices[answer] = names[int(rng.integers(6)) + 6 * (1 - family)]
        asked.append(Question("what", text, tuple(choices), answer))
    table = text_only_guess(asked[:400], asked[400:]).set_index("kind")
    assert table.over_chance_frac["all"] > 0.1, table


def test_the_guesser_needs_questions():
    with pytest.raises(ValueError, match="0 train"):
        text_only_guess([], [Question("what", "what spins ?", ("a", "b"), 0)])
