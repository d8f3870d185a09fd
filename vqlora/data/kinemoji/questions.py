"""Multiple-choice questions about a scene whose text gives the answer away as little as possible.

A wrong name is exchangeable with the right one: it is a sprite that may make the same motions in this domain,
from the same clip or absent from it. Answers from a fixed list (directions, cells, numbers, times) are near
uniform given the question. Choices come in random order. `guess.text_only_guess` measures what is left.
"""

from functools import cache

import numpy as np

from ..clips import Question
from .domains import DOMAINS, Domain, allowed
from .language import verb
from .lexicon import NUMBERS, QUESTIONS, TIMES
from .scenes import CELLS, DIRECTIONS, MOTIONS, Event, Scene
from .sprites import SPRITES

CHOICES = 4
STILL_KINDS = ("where", "still", "objects", "shown", "missing")  # evidence in any one frame
MOTION_KINDS = ("what", "direction", "order", "count", "where", "when", "still", "aside")


def questions(scene: Scene) -> tuple[Question, ...]:
    """Up to six questions about a scene, at most one of a kind; the same scene gives the same questions.

    Domains with unmentioned movers are asked only what a single frame shows (`STILL_KINDS`).
    """
    maker = _Maker(scene)
    kinds = STILL_KINDS if maker.domain.movers else MOTION_KINDS
    made = [q for q in (getattr(maker, kind)() for kind in kinds) if q is not None]
    if len(made) > 6:  # "where" and "still" ask the same of a picture: drop one
        drop = ("where", "still")[int(maker.rng.integers(2))]
        made = [q for q in made if q.kind != drop][:6]
    return tuple(made)


class _Maker:
    """One method per kind; each returns a Question, or None where the scene does not support the kind."""

    def __init__(self, scene: Scene):
        self.scene, self.domain = scene, DOMAINS[scene.domain]
        self.rng = np.random.default_rng([scene.seed, 1])
        self.told = [e for e in scene.events if scene.actors[e.actor].mentioned]
        self.cast = {a.sprite for a in scene.actors} | ({scene.aside} - {None})
        self.actors = [a for a in scene.actors if a.mentioned]
        self.movers = [scene.actors[e.actor].sprite for e in self.told]
        self.idle = [a.sprite for a in self.actors if a.sprite not in self.movers]

    # -- evidence in motion

    def what(self):
        event = self._pick(self.told)
        right = self._sprite(event)
        same = {self._sprite(e) for e in self.told if e.motion == event.motion}
        others = [s for s in self._peers(right) if s not in same]
        return self._named("what", self._text("what", v=self._verb(event)), right, others)

    def direction(self):
        moves = [e for e in self.told if e.motion in DIRECTIONS]
        if not moves:
            return None
        event = self._pick(moves)
        text = self._text("direction", n=self._name(event))
        return self._closed("direction", text, DIRECTIONS, event.motion)

    def order(self):
        # Only among movers that are exchangeable, so that no name is likelier to be first than another.
        asked = [(k, self._peers(self._sprite(self.told[k]), self.movers)) for k in (0, -1)]
        asked = [(k, peers) for k, peers in asked if peers]
        if not asked:
            return None
        k, peers = self._pick(asked)
        return self._named("order", QUESTIONS["order"][-k], self._sprite(self.told[k]), peers)

    def count(self):
        return self._closed("count", QUESTIONS["count"][0], NUMBERS, NUMBERS[len(self.told) - 1])

    def when(self):
        # Thirds of the frames at which an event of its length can start. Scene cuts leave fewer events to
        # the middle, so these are taken more often: all three answers are then about equally likely.
        middle = 1.5 if self.domain.cut_share else 1.0
        thirds = [int(3 * (e.start - 1) / (self.scene.frames - 1 - (e.end - e.start))) for e in self.told]
        weights = np.array([middle if third == 1 else 1.0 for third in thirds])
        k = int(self.rng.choice(len(thirds), p=weights / weights.sum()))
        text = self._text("when", n=self._name(self.told[k]), v=self._verb(self.told[k]))
        return self._closed("when", text, TIMES, TIMES[thirds[k]])

    # -- evidence in a still frame

    def where(self):
        actor = self._pick(self.actors)
        hidden = any(e.motion == "appear" and self.scene.actors[e.actor] is actor for e in self.told)
        at_start = actor.shot == 0 and not hidden
        text = self._text("where", 0 if at_start else 1, n=SPRITES[actor.sprite].names["en"])
        return self._closed("where", text, CELLS, CELLS[actor.cell])

    def still(self):
        hidden = {self._sprite(e) for e in self.told if e.motion == "appear"}
        seen = [a for a in self.actors if a.shot == 0 and a.sprite not in hidden]
        if not seen:
            return None
        actor = self._pick(seen)
        text = self._text("still", c=CELLS[actor.cell])
        return self._named("still", text, actor.sprite, self._peers(actor.sprite))

    def aside(self):
        if self.scene.aside is None:
            return None
        return self._named("aside", QUESTIONS["aside"][0], self.scene.aside, self._peers(self.scene.aside))

    def objects(self):
        if len(self.actors) > len(NUMBERS) or len(self.scene.shots) > 1:
            return None
        # A shot holds 1, 2, 3 mentioned sprites in 1/9, 2/9, 6/9 of the clips: thin them out to equal shares.
        if self.rng.random() >= (1, 1 / 2, 1 / 6)[len(self.actors) - 1]:
            return None
        return self._closed("objects", QUESTIONS["objects"][0], NUMBERS, NUMBERS[len(self.actors) - 1])

    def shown(self):
        actor = self._pick(self.actors)
        return self._named("shown", QUESTIONS["shown"][0], actor.sprite, [])

    def missing(self):
        actor = self._pick(self.actors)
        shown = [actor.sprite, *self._peers(actor.sprite)][:CHOICES - 1]
        absent = self._absent(actor.sprite, 1)
        if len(shown) < 2 or not absent:
            return None
        names = [SPRITES[s].names["en"] for s in (*absent, *shown)]
        return self._closed("missing", QUESTIONS["missing"][0], names, names[0])

    # -- helpers

    def _pick(self, rows):
        return rows[int(self.rng.integers(len(rows)))]

    def _sprite(self, event: Event) -> int:
        return self.scene.actors[event.actor].sprite

    def _name(self, event: Event) -> str:
        return SPRITES[self._sprite(event)].names["en"]

    def _verb(self, event: Event) -> str:
        return verb(event.motion, "en", self.domain.lexicon, int(self.rng.integers(2)))

    def _text(self, kind: str, which: int = 0, **words: str) -> str:
        return QUESTIONS[kind][which].format(**words)

    def _peers(self, sprite: int, among: list[int] | None = None) -> list[int]:
        """Other sprites of the clip that are exchangeable with `sprite`: they may make the same motions."""
        mine = _profile(self.domain, sprite)
        shown = self.movers + self.idle if among is None else among
        return [s for s in shown if s != sprite and _profile(self.domain, s) == mine]

    def _absent(self, sprite: int, count: int) -> list[int]:
        """Up to `count` sprites that are exchangeable with `sprite` and not in the clip."""
        mine = _profile(self.domain, sprite)
        pool = [s for s in self.domain.sprites if s not in self.cast and _profile(self.domain, s) == mine]
        return [int(s) for s in self.rng.permutation(pool)[:count]]

    def _named(self, kind: str, text: str, right: int, peers: list[int]) -> Question:
        """A question about sprites: the right one, up to two peers of the clip, absent ones to fill up."""
        wrong = [int(s) for s in self.rng.permutation(peers)[:2]]
        wrong += self._absent(right, CHOICES - 1 - len(wrong))
        names = [SPRITES[s].names["en"] for s in (right, *wrong)]
        return self._closed(kind, text, names, names[0])

    def _closed(self, kind: str, text: str, choices, right: str) -> Question:
        order = [choices[int(i)] for i in self.rng.permutation(len(choices))]
        return Question(kind, text, tuple(order), order.index(right))


@cache
def _profile(domain: Domain, sprite: int) -> tuple[bool, ...]:
    return tuple(allowed(domain, sprite, motion) for motion in MOTIONS)
