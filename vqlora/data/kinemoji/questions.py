"""Multiple-choice questions about a scene whose text gives the answer away as little as possible.

A wrong choice plays the role of the right one: it is drawn from the sprites that *could* have been the answer
in this domain (for "what spins ?" those that may spin), some of them from the same clip, the others absent.
Answers from a fixed list (directions, cells, numbers, times) are near uniform given the question. Choices stand
in random order.
"""

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
    """The four to six questions of a scene, at most one of a kind; the same scene gives the same questions.

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
        fits = [s for s in self.movers + self.idle if s not in same and allowed(self.domain, s, event.motion)]
        absent = self._absent(lambda: event.motion)
        return self._named("what", self._text("what", v=self._verb(event)), right, fits, absent)

    def direction(self):
        moves = [e for e in self.told if e.motion in DIRECTIONS]
        if not moves:
            return None
        event = self._pick(moves)
        text = self._text("direction", n=self._name(event))
        return self._closed("direction", text, DIRECTIONS, event.motion)

    def order(self):
        if len(self.told) < 2:
            return None
        last = int(self.rng.integers(2))
        right = self._sprite(self.told[-last])
        others = [s for s in self.movers if s != right]
        return self._named("order", QUESTIONS["order"][last], right, others, self._absent(self._any_motion))

    def count(self):
        return self._closed("count", QUESTIONS["count"][0], NUMBERS, NUMBERS[len(self.told) - 1])

    def when(self):
        event = self._pick(self.told)
        third = int((event.start + event.end) / 2 * 3 / self.scene.frames)
        text = self._text("when", n=self._name(event), v=self._verb(event))
        return self._closed("when", text, TIMES, TIMES[third])

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
        others, absent = self._role(actor.sprite)
        return self._named("still", self._text("still", c=CELLS[actor.cell]), actor.sprite, others, absent)

    def aside(self):
        if self.scene.aside is None:
            return None
        return self._named("aside", QUESTIONS["aside"][0], self.scene.aside, self.movers + self.idle,
                           self._absent(None))

    def objects(self):
        if len(self.actors) > len(NUMBERS) or len(self.scene.shots) > 1:
            return None
        # A shot holds 1, 2, 3 mentioned sprites in 1/9, 2/9, 6/9 of the clips: thin them out to equal shares.
        if self.rng.random() >= (1, 1 / 2, 1 / 6)[len(self.actors) - 1]:
            return None
        return self._closed("objects", QUESTIONS["objects"][0], NUMBERS, NUMBERS[len(self.actors) - 1])

    def shown(self):
        actor = self._pick(self.actors)
        return self._named("shown", QUESTIONS["shown"][0], actor.sprite, [], self._role(actor.sprite)[1])

    def missing(self):
        role = self._pick(self.actors).sprite
        others, absent = self._role(role)
        shown = [role, *others][:CHOICES - 1]
        if len(shown) < 2:
            return None
        return self._named("missing", QUESTIONS["missing"][0], next(absent), shown, iter(()))

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

    def _any_motion(self) -> str:
        return MOTIONS[int(self.rng.integers(len(MOTIONS)))]

    def _role(self, sprite: int):
        """In-clip sprites of the same role (mover or idle) as `sprite`, and a stream of absent ones."""
        if sprite in self.movers:
            return [s for s in self.movers if s != sprite], self._absent(self._any_motion)
        return [s for s in self.idle if s != sprite], self._absent(None)

    def _absent(self, motion):
        """Endless stream of sprites absent from the clip; `motion()` is what each must be able to do."""
        while True:
            wanted = motion() if motion else None
            pool = [s for s in self.domain.sprites if s not in self.cast and _can(self.domain, s, wanted)]
            if pool:
                yield self._pick(pool)

    def _named(self, kind: str, text: str, right: int, inside: list[int], absent) -> Question:
        """A question about sprites: the right one, up to two others of the clip, absent ones to fill up."""
        most = len(inside) if kind == "missing" else 2
        wrong = [int(s) for s in self.rng.permutation(inside)][:most]
        for sprite in absent:
            if len(wrong) == CHOICES - 1:
                break
            if sprite not in wrong and sprite != right:
                wrong.append(sprite)
        names = [SPRITES[s].names["en"] for s in (right, *wrong)]
        return self._closed(kind, text, names, names[0])

    def _closed(self, kind: str, text: str, choices, right: str) -> Question:
        order = [choices[int(i)] for i in self.rng.permutation(len(choices))]
        return Question(kind, text, tuple(order), order.index(right))


def _can(domain: Domain, sprite: int, motion: str | None) -> bool:
    return motion is None or allowed(domain, sprite, motion)
