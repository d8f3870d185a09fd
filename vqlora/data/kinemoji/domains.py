"""The domains of Kinemoji: what each changes against the source, so that each asks one question.

Which (sprite, motion) pairs a domain may show keeps the language shift honest: the source never shows a
target-only pair, and the language domain shows nothing else. Motions are held out by whole groups, so that
a sprite's name tells nothing about *which* motion of a group it makes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .sprites import SPRITES

MOTIONS = (
    "left", "right", "up", "down", "grow", "shrink", "appear", "vanish", "spin", "bounce", "shake", "blink",
)  # fmt: skip
DIRECTIONS = MOTIONS[:4]
LASTING = MOTIONS[:8]
PASSING = MOTIONS[8:]

SOURCE_SPRITES = tuple(s.index for s in SPRITES if s.group == "source")
TARGET_SPRITES = tuple(s.index for s in SPRITES if s.group == "target")
SHARED_SPRITES = SOURCE_SPRITES[
    :12
]  # seen in the source with two motion groups, in the language domain with the third
LANGUAGE_SPRITES = SHARED_SPRITES + TARGET_SPRITES[:12]


def target_only_pair(sprite: int, motion: str) -> bool:
    """Whether the source (frames and text alike) may never show ``sprite`` making ``motion``."""
    if sprite in TARGET_SPRITES:
        return True
    return sprite in SHARED_SPRITES and MOTIONS.index(motion) // 4 == sprite % 3


@dataclass(frozen=True)
class Domain:
    """How clips of one domain are drawn and told. Lengths in frames, sizes in pixels of a 64 x 64 picture."""

    name: str
    about: str
    sprites: tuple[int, ...] = SOURCE_SPRITES
    target_pairs: bool = False  # show target-only pairs and nothing else
    frames: int = 40
    event_frames: tuple[int, int] = (5, 9)
    backgrounds: tuple[str, ...] = ("gradient", "noise")
    style: str = "plain"  # caption templates
    lexicon: str = "plain"  # words for the motions
    cut_share: float = 0.25  # clips with a scene cut
    noise: float = 4.0  # camera noise, standard deviation in grey levels
    recolour: bool = False
    flicker: bool = False
    degrade: str | None = None  # moving | random
    insert: str | None = None  # still | random
    aside: bool = False  # the inserted shot carries part of the answer
    camera: bool = False  # pan and shake
    movers: bool = False  # things that move and are never mentioned
    scenes: str = ""  # the domain whose very scenes are shown, by another camera
    crf: int = 18  # of the H.264 encoder: 23 and more wipe out the camera noise


_ALL = (
    Domain("source", "what the base is trained on"),
    Domain(
        "language",
        "new names, new pairs of object and motion, other verbs, another caption style",
        sprites=LANGUAGE_SPRITES,
        target_pairs=True,
        backgrounds=("stripes", "checks"),
        style="report",
        lexicon="variant",
    ),
    Domain(
        "visual", "negative pictures with permuted colours", recolour=True, backgrounds=("stripes", "checks")
    ),
    Domain(
        "bursts", "long clips, short events, flickering light", frames=96, event_frames=(3, 5), flicker=True
    ),
    Domain("degraded", "blur and noise on frames in which something moves", degrade="moving"),
    Domain("degraded-twin", "the same blur and noise on random frames", degrade="random"),
    Domain("inserts", "frames of another clip spliced in while nothing moves", insert="still", cut_share=0.0),
    Domain("inserts-twin", "frames of another clip spliced in anywhere", insert="random", cut_share=0.0),
    Domain(
        "cutaways",
        "a spliced-in shot that the caption must mention",
        insert="still",
        aside=True,
        cut_share=0.0,
    ),
    Domain("cutaways-twin", "the same shot spliced in anywhere", insert="random", aside=True, cut_share=0.0),
    Domain("distractor", "camera pan and shake, grey movers nobody mentions", camera=True, movers=True),
)
_SENSORS = tuple(
    replace(_ALL[0], name=f"source-{name}", about=about, scenes="source", **change)
    for name, about, change in (
        ("noise0", "the source without camera noise", {"noise": 0.0}),
        ("noise8", "the source with twice the camera noise", {"noise": 8.0}),
        ("noise16", "the source with four times the camera noise", {"noise": 16.0}),
        ("crf28", "the source, encoded coarsely", {"crf": 28}),
        ("crf38", "the source, encoded very coarsely", {"crf": 38}),
    )
)
DOMAINS: dict[str, Domain] = {domain.name: domain for domain in _ALL + _SENSORS}


def allowed(domain: Domain, sprite: int, motion: str) -> bool:
    """Whether ``domain`` may show ``sprite`` making ``motion``."""
    return sprite in domain.sprites and target_only_pair(sprite, motion) == domain.target_pairs
