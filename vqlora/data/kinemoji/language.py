"""What a Kinemoji scene says: reference captions in five languages, their parser, and text-only sentences.

The caption text is lower-case tokens joined by single spaces (Chinese: characters without spaces). Events are
told in temporal order in every style; a cutaway (`scene.aside`) is told last. `parse` inverts every caption.
"""

import re
from functools import cache

import numpy as np

from .domains import DOMAINS, target_only_pair
from .lexicon import (
    ASIDE,
    EXTRA,
    LANGUAGES,
    NUMBERS,
    PLAIN,
    QUESTIONS,
    REPORT,
    TIMES,
    VARIANTS,
    VERBS,
    Pattern,
)
from .scenes import CELLS, DIRECTIONS, MOTIONS, Scene
from .sprites import SPRITES

ASIDE_MOTION = "aside"  # the "motion" under which `parse` and `truth` list a cutaway
STYLES = {"plain": PLAIN, "report": REPORT}
LEXICONS = ("plain", "variant")
_PLACEHOLDER = re.compile(r"\{\w\}")


def captions(scene: Scene, language: str = "en") -> tuple[str, ...]:
    """The five distinct reference captions of a scene, one per pattern of its domain's style.

    Raises ValueError for a language that is not in `LANGUAGES`.
    """
    _known(language)
    domain = DOMAINS[scene.domain]
    told = [(scene.actors[e.actor].sprite, e.motion) for e in scene.events if scene.actors[e.actor].mentioned]
    return tuple(
        _tell(pattern, told, scene.aside, language, domain.lexicon, k)
        for k, pattern in enumerate(STYLES[domain.style][language])
    )


def clauses(scene: Scene) -> tuple[str, ...]:
    """One English sentence per told event, in temporal order: the texts of timed segments."""
    domain = DOMAINS[scene.domain]
    pattern = STYLES[domain.style]["en"][0 if domain.style == "report" else 1]
    told = [(scene.actors[e.actor].sprite, e.motion) for e in scene.events if scene.actors[e.actor].mentioned]
    return tuple(_tell(pattern._replace(head=""), [pair], None, "en", domain.lexicon, 0) for pair in told)


def truth(scene: Scene) -> list[tuple[str, str]]:
    """(English name, motion) of the told events in temporal order, then (name, "aside") for a cutaway."""
    told = [(e, scene.actors[e.actor]) for e in scene.events]
    pairs = [(SPRITES[a.sprite].names["en"], e.motion) for e, a in told if a.mentioned]
    return pairs if scene.aside is None else [*pairs, (SPRITES[scene.aside].names["en"], ASIDE_MOTION)]


def verb(motion: str, language: str = "en", lexicon: str = "plain", synonym: int = 0) -> str:
    """The words for a motion; the variant lexicon has one verb per motion, the plain one two."""
    return VARIANTS[language][motion] if lexicon == "variant" else VERBS[language][motion][synonym % 2]


def _tell(pattern: Pattern, told, aside: int | None, language: str, lexicon: str, k: int) -> str:
    # The synonym follows from pattern and motion: it varies over references, yet leaves nothing to guess.
    parts = [pattern.head]
    for i, (sprite, motion) in enumerate(told):
        words = verb(motion, language, lexicon, k + MOTIONS.index(motion))
        clause = pattern.clause.format(n=SPRITES[sprite].names[language], v=words, i=i + 1)
        parts += [pattern.link] * (i > 0) + [clause]
    if aside is not None:
        words = ASIDE[language][2 if pattern in REPORT[language] else k % 2]
        parts.append(pattern.aside.format(a=words, n=SPRITES[aside].names[language]))
    return ("" if language == "zh" else " ").join(p for p in parts if p)


def sentence_tokens(text: str, language: str = "en") -> list[str]:
    """Lower-case tokens of a caption, question or answer: words, or single characters in Chinese."""
    return [c for c in text if not c.isspace()] if language == "zh" else text.lower().split()


@cache
def _tables(language: str):
    """Phrases as {first token: [(tokens, is_name, value)], longest first}; tokens that end a clause."""
    phrases = [(s.names[language], True, s.names["en"]) for s in SPRITES]
    phrases += [(v, False, m) for m in MOTIONS for v in (*VERBS[language][m], VARIANTS[language][m])]
    phrases += [(a, False, ASIDE_MOTION) for a in ASIDE[language]]
    table: dict[str, list] = {}
    for text, is_name, value in phrases:
        tokens = tuple(sentence_tokens(text, language))
        table.setdefault(tokens[0], []).append((tokens, is_name, value))
    for rows in table.values():
        rows.sort(key=lambda row: -len(row[0]))
    patterns = [p for style in (PLAIN, REPORT, EXTRA) for p in style[language]]
    inside = {t for p in patterns for t in _fixed(p.clause + " " + p.aside, language)}
    inside |= {t for text, *_ in phrases for t in sentence_tokens(text, language)}
    return table, frozenset(t for p in patterns for t in _fixed(p.link, language)) - inside


def _fixed(template: str, language: str) -> list[str]:
    return sentence_tokens(_PLACEHOLDER.sub(" ", template), language)


def parse(caption: str, language: str = "en") -> list[tuple[str, str]]:
    """(English name, motion) pairs told by a caption, in order; a cutaway gives (name, "aside").

    Exact for every caption of this module, in all styles and lexicons; in any other text it returns the pairs
    it can find: a name and a motion next to each other, in either order, with no clause boundary between.
    """
    _known(language)
    table, boundaries = _tables(language)
    tokens = sentence_tokens(caption, language)
    marks: list[tuple[bool, str] | None] = []
    i = 0
    while i < len(tokens):
        for words, is_name, value in table.get(tokens[i], ()):
            if tuple(tokens[i:i + len(words)]) == words:
                marks.append((is_name, value))
                i += len(words)
                break
        else:
            if tokens[i] in boundaries:
                marks.append(None)
            i += 1
    pairs, last = [], None
    for mark in marks:
        if mark is not None and last is not None and mark[0] != last[0]:
            pairs.append((last[1], mark[1]) if last[0] else (mark[1], last[1]))
            last = None
        else:
            last = mark
    return pairs


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token that a caption, question or choice in the five languages can need, sorted."""
    tokens: set[str] = set()
    for language in LANGUAGES:
        texts = [s.names[language] for s in SPRITES] + list(ASIDE[language])
        texts += [v for m in MOTIONS for v in (*VERBS[language][m], VARIANTS[language][m])]
        texts += [part for style in (PLAIN, REPORT, EXTRA) for p in style[language] for part in p]
        for text in texts:
            tokens.update(_fixed(text, language))
    asked = [text for texts in QUESTIONS.values() for text in texts]
    for text in (*asked, *CELLS, *DIRECTIONS, *NUMBERS, *TIMES, "1 2 3"):
        tokens.update(_fixed(text, "en"))
    return tuple(sorted(tokens))


def text_only(
    rng: np.random.Generator,
    language: str = "en",
    *,
    variant_frac: float = 0.5,
    extra_frac: float = 0.4,
    aside_frac: float = 0.3,
) -> str:
    """A random sentence in a source pattern, for text-only pretraining.

    It may use the variant verbs, names of target sprites (in a cutaway) and, with chance `extra_frac`,
    patterns that hold the words of the report style; it never uses a report pattern, and never a
    (sprite, motion) pair that only target domains may show.
    """
    _known(language)
    told: list[tuple[int, str]] = []
    wanted = int(rng.integers(1, 4))
    while len(told) < wanted:
        sprite, motion = int(rng.integers(len(SPRITES))), MOTIONS[int(rng.integers(len(MOTIONS)))]
        if not target_only_pair(sprite, motion) and sprite not in [s for s, _ in told]:
            told.append((sprite, motion))
    patterns = EXTRA[language] if rng.random() < extra_frac else PLAIN[language]
    pattern = patterns[int(rng.integers(len(patterns)))]
    lexicon = "variant" if rng.random() < variant_frac else "plain"
    text = _tell(pattern, told, None, language, lexicon, int(rng.integers(2)))
    if rng.random() < aside_frac:
        words = ASIDE[language][int(rng.integers(3))]
        name = SPRITES[int(rng.integers(len(SPRITES)))].names[language]
        text += ("" if language == "zh" else " ") + pattern.aside.format(a=words, n=name)
    return text


def _known(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"language: {language!r} is not one of {', '.join(LANGUAGES)}")
