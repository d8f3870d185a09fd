"""Draw a scene. Pure: each frame depends on the scene and its own number only, so any subset can be drawn
alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .domains import DOMAINS
from .scenes import Actor, Event, Scene, Shot

SIDE = 64
_MARGIN = 12  # pixels of background beyond each edge, for the moving camera


def render(scene: Scene, sprites: np.ndarray, indices=None) -> np.ndarray:
    """Frames as uint8 ``[T, 64, 64, 3]``.

    ``sprites`` is :func:`~vqlora.data.kinemoji.sprites.load_sprites`'s array; ``indices`` the frame numbers
    (default all). Raises ``IndexError`` for a frame outside the clip.
    """
    domain = DOMAINS[scene.domain]
    indices = np.arange(scene.frames) if indices is None else np.asarray(indices, dtype=int)
    if len(indices) and not (0 <= indices.min() and indices.max() < scene.frames):
        raise IndexError(f"{scene.id}: frame {indices.min()}..{indices.max()} asked of {scene.frames}")
    motion_of = {e.actor: e for e in scene.events}
    backgrounds = [_background(shot) for shot in scene.shots]
    stills: dict = {}
    out = np.empty((len(indices), SIDE, SIDE, 3), dtype=np.uint8)
    for row, t in enumerate(indices):
        t = int(t)
        if t in scene.inserted:
            key, frame = "insert", stills.get("insert")
            states = None
        else:
            shot = next(i for i, s in enumerate(scene.shots) if s.start <= t < s.end)
            states = tuple(
                (i, _state(actor, motion_of.get(i), t, scene.frames))
                for i, actor in enumerate(scene.actors)
                if actor.shot == shot
            )
            offset = _camera(scene, t) if domain.camera else (0, 0)
            key = (shot, states, offset)
            frame = stills.get(key)
        if frame is None:
            if states is None:
                frame = _insert(scene, sprites)
            else:
                dx, dy = _MARGIN + offset[0], _MARGIN + offset[1]
                frame = backgrounds[shot][dy : dy + SIDE, dx : dx + SIDE].copy()
                for i, state in states:
                    actor = scene.actors[i]
                    _paste(frame, sprites[actor.sprite], actor, state, offset)
            stills[key] = frame
        out[row] = _expose(frame, scene, t, domain)
    return out


def states_at(scene: Scene, t: int) -> list[tuple[Actor, tuple[float, float, float, float, float]]]:
    """Who is drawn at frame ``t`` and how: (actor, (x, y, scale, opacity, angle)); empty on a spliced-in
    frame."""
    if t in scene.inserted:
        return []
    motion_of = {e.actor: e for e in scene.events}
    shot = next(i for i, s in enumerate(scene.shots) if s.start <= t < s.end)
    return [
        (actor, _state(actor, motion_of.get(i), t, scene.frames))
        for i, actor in enumerate(scene.actors)
        if actor.shot == shot
    ]


def _state(
    actor: Actor, event: Event | None, t: int, frames: int
) -> tuple[float, float, float, float, float]:
    """(x, y, scale, opacity, angle in degrees) of an actor at frame ``t``."""
    x, y, scale, opacity, angle = actor.x, actor.y, 1.0, 1.0, 0.0
    if not actor.mentioned:  # a grey mover drifts all the time
        phase = 2 * np.pi * (t / frames + actor.x / 64)
        return round(32 + 24 * np.sin(phase), 1), round(y + 8 * np.cos(2 * phase), 1), 1.0, 1.0, 0.0
    if event is None:
        return x, y, scale, opacity, angle
    p = min(
        max((t - event.start + 1) / (event.end - event.start), 0.0), 1.0
    )  # 0 before, 1 from the last frame on
    during = 0.0 < p < 1.0
    match event.motion:
        case "left":
            x -= 13 * p
        case "right":
            x += 13 * p
        case "up":
            y -= 13 * p
        case "down":
            y += 13 * p
        case "grow":
            scale = 1 + 0.5 * p
        case "shrink":
            scale = 1 - 0.45 * p
        case "appear":
            opacity = p
        case "vanish":
            opacity = 1 - p
        case "spin" if during:
            angle = -360 * p
        case "bounce" if during:
            y -= 11 * abs(np.sin(2 * np.pi * p))
        case "shake" if during:
            x += 6 * (1 if (t - event.start) % 2 else -1)
        case "blink" if during:
            opacity = 0.0 if (t - event.start) % 2 == 0 else 1.0
    return round(x, 2), round(y, 2), round(scale, 3), round(opacity, 3), round(angle, 1)


def _paste(frame: np.ndarray, sprite: np.ndarray, actor: Actor, state, offset=(0, 0)) -> None:
    x, y, scale, opacity, angle = state
    if opacity <= 0:
        return
    drawing = _scaled(sprite, max(2, round(actor.size * scale)), angle, not actor.mentioned)
    side = drawing.shape[0]
    left, top = round(x - offset[0] - side / 2), round(y - offset[1] - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIDE), min(top + side, SIDE)
    if x0 >= x1 or y0 >= y1:
        return
    part = drawing[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:] * (opacity / 255.0)
    region = frame[y0:y1, x0:x1]
    region += alpha * (part[..., :3] - region)


def _scaled(sprite: np.ndarray, side: int, angle: float, grey: bool) -> np.ndarray:
    return _scaled_bytes(sprite.tobytes(), sprite.shape[0], side, angle, grey)


@lru_cache(maxsize=20000)
def _scaled_bytes(data: bytes, px: int, side: int, angle: float, grey: bool) -> np.ndarray:
    from PIL import Image

    picture = Image.frombytes("RGBA", (px, px), data)
    if angle:
        picture = picture.rotate(angle, resample=Image.BILINEAR)
    picture = picture.resize((side, side), Image.BOX if side < px // 2 else Image.BILINEAR)
    array = np.asarray(picture, dtype=np.float32)
    if grey:
        array = array.copy()
        array[..., :3] = array[..., :3].mean(axis=-1, keepdims=True)
    return array


def _background(shot: Shot) -> np.ndarray:
    """Float32 ``[88, 88, 3]``: muted, so that sprites stand out, but never flat."""
    rng = np.random.default_rng(shot.background_seed)
    side = SIDE + 2 * _MARGIN
    a, b = rng.uniform(60, 200, size=(2, 3)).astype(np.float32)
    u = np.linspace(0, 1, side, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * u[:, None]
    match shot.background:
        case "gradient":
            mix = (along - along.min()) / np.ptp(along)
        case "noise":
            coarse = rng.uniform(0, 1, size=(8, 8)).astype(np.float32)
            mix = coarse.repeat(side // 8, axis=0).repeat(side // 8, axis=1)
        case "stripes":
            mix = (np.sin(2 * np.pi * along * rng.uniform(4, 8)) > 0) * 0.5
        case "checks":
            cell = int(rng.integers(6, 13))
            row = np.arange(side) // cell
            mix = ((row[:, None] + row[None]) % 2) * 0.5
        case other:
            raise ValueError(f"background {other!r} is unknown; allowed: gradient, noise, stripes, checks")
    return a + (b - a) * mix[..., None].astype(np.float32)


def _camera(scene: Scene, t: int) -> tuple[int, int]:
    rng = np.random.default_rng([scene.seed, 3])
    dx, dy = rng.uniform(-7, 7, size=2)
    progress = t / max(scene.frames - 1, 1) - 0.5
    shake = np.random.default_rng([scene.seed, 4, t]).integers(-2, 3, size=2)
    return int(round(dx * progress)) + int(shake[0]), int(round(dy * progress)) + int(shake[1])


def _insert(scene: Scene, sprites: np.ndarray) -> np.ndarray:
    """A still shot of something else: the aside, large and central, or two sprites that play no part."""
    rng = np.random.default_rng([scene.seed, 5])
    domain = DOMAINS[scene.domain]
    shot = Shot(0, 1, str(rng.choice(domain.backgrounds)), int(rng.integers(2**31)))
    frame = _background(shot)[_MARGIN : _MARGIN + SIDE, _MARGIN : _MARGIN + SIDE].copy()
    if scene.aside is not None:
        cast = [Actor(scene.aside, 0, 34, 0, 32.0, 32.0)]
    else:
        others = rng.choice(
            [s for s in domain.sprites if s not in {a.sprite for a in scene.actors}], 2, replace=False
        )
        cells = rng.permutation(4)[:2]
        cast = [
            Actor(int(s), int(c), 24, 0, 16.0 + 32 * (c % 2), 16.0 + 32 * (c // 2))
            for s, c in zip(others, cells, strict=True)
        ]
    for actor in cast:
        _paste(frame, sprites[actor.sprite], actor, (actor.x, actor.y, 1.0, 1.0, 0.0))
    return frame


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(20260101).standard_normal(1 << 19, dtype=np.float32)


def _expose(frame: np.ndarray, scene: Scene, t: int, domain) -> np.ndarray:
    """What the camera adds: recolouring, flicker, blur, noise."""
    rng = np.random.default_rng([scene.seed, 7, t])
    noise_sd = domain.noise
    if domain.recolour:
        frame = 255.0 - frame[..., (1, 2, 0)]
    if domain.flicker:
        frame = frame * np.float32(rng.uniform(0.75, 1.15))
    if t in scene.degraded:
        frame, noise_sd = _blur(frame), noise_sd + 14
    bank, size = _noise_bank(), frame.size
    offset = int(rng.integers(bank.size - size))
    noisy = bank[offset : offset + size].reshape(frame.shape) * np.float32(noise_sd)
    noisy += frame
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


def _blur(frame: np.ndarray, radius: int = 2) -> np.ndarray:
    for axis in (0, 1):
        width = [(0, 0)] * 3
        width[axis] = (radius, radius)
        padded = np.pad(frame, width, mode="edge")
        frame = sum(np.take(padded, range(k, k + SIDE), axis=axis) for k in range(2 * radius + 1)) / (
            2 * radius + 1
        )
    return frame.astype(np.float32)
