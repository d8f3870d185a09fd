"""Mono samples to what is heard in a stretch of time: log energies of bands, a row per time window.

    band_energies(samples, 8000)          # float32 [24, 32]: windows by bands, silence is 0

Bands are spread evenly over the logarithm of frequency, windows evenly over the clip; nothing here knows what
the sounds mean.
"""

from __future__ import annotations

import numpy as np

RATE_HZ = 8_000
WINDOWS = 24  # a sixth to a quarter of a second of most clips; as many tokens as six frames have
BANDS = 32  # six to an octave: tones a whole tone apart fall into different ones
LOWEST_HZ, HIGHEST_HZ = 100.0, 4_000.0
FLOOR = 1e-6  # power of a full-scale square wave is 1: what is 60 dB below counts as silence


def band_energies(
    samples: np.ndarray,
    rate_hz: int = RATE_HZ,
    windows: int = WINDOWS,
    bands: int = BANDS,
) -> np.ndarray:
    """Float32 `[windows, bands]`: log10(1 + power / FLOOR), bels above the floor, of `samples` `[N]` in
    [-1, 1].

    A window is weighted by a Hann curve twice as long as its share of the clip, so that neighbours overlap
    and no onset falls between two. Power is that of the samples within the band (Parseval); no samples are
    silence. Raises ValueError for samples of another shape or that are not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"samples: shape {samples.shape}; expected [N], all of them finite")
    if not len(samples):
        return np.zeros((windows, bands), np.float32)
    length = 2 * max(1, -(-len(samples) // windows))
    around = np.concatenate([np.zeros(length), samples, np.zeros(length)])
    centres = length + ((np.arange(windows) + 0.5) * len(samples) / windows).astype(int)
    pieces = np.stack([around[centre - length // 2 : centre - length // 2 + length] for centre in centres])
    curve = np.hanning(length + 2)[1:-1]
    power = np.abs(np.fft.rfft(pieces * curve)) ** 2 / (length * np.sum(curve**2))
    power[:, 1:] *= 2  # of the negative frequencies, too
    edges = np.geomspace(LOWEST_HZ, min(HIGHEST_HZ, rate_hz / 2), bands + 1)
    band = np.searchsorted(edges, np.fft.rfftfreq(length, 1 / rate_hz), side="right") - 1
    inside = (band >= 0) & (band < bands)
    found = np.zeros((bands, windows))
    np.add.at(found, band[inside], power[:, inside].T)
    return np.log10(1 + found.T / FLOOR).astype(np.float32)
