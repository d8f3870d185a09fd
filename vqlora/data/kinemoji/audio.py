"""The optional sound of a scene: one short tone per event, at the moment it starts, pitched by its motion.

Tones sound for mentioned events only, so sound marks what a caption tells; between them there is silence.
"""

import numpy as np

from .scenes import MOTIONS, Scene

RATE_HZ = 8_000  # ample for these tones; 16 kHz would triple the cost of encoding
TONE_S = 0.25
PITCH_HZ = {motion: 330.0 * 2 ** (k / 6) for k, motion in enumerate(MOTIONS)}  # whole tones, 330 to 1176 Hz


def soundtrack(scene: Scene, fps: int) -> np.ndarray:
    """Mono sound as float32 `[frames * RATE_HZ / fps]` in [-1, 1]: a struck tone where an event starts."""
    sound = np.zeros(scene.frames * RATE_HZ // fps, np.float32)
    t_s = np.arange(int(TONE_S * RATE_HZ)) / RATE_HZ
    decay = np.minimum(1, t_s / 0.005) * np.exp(-t_s * 14)
    for event in scene.events:
        if scene.actors[event.actor].mentioned:
            start = event.start * RATE_HZ // fps
            tone = 0.6 * np.sin(2 * np.pi * PITCH_HZ[event.motion] * t_s) * decay
            sound[start:start + len(tone)] += tone[:len(sound) - start].astype(np.float32)
    return sound
