"""The audio track of a video file as mono samples; the one place that decodes sound."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from vqlora.frames.container import VideoError, reason_of
from vqlora.sound.bands import RATE_HZ


def read_track(
    path: Path, start_s: float | None = None, end_s: float | None = None, rate_hz: int = RATE_HZ
) -> np.ndarray:
    """Float32 `[N]` in [-1, 1] at `rate_hz`: the stretch from `start_s` to `end_s` of the picture's time.

    Samples lie where their time stamps say, whatever padding the codec has; where nothing sounds they are 0,
    as they are all along a file without an audio track. Raises VideoError for a file that cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            length_s = _length_s(container)
            begin, end = start_s or 0.0, length_s if end_s is None else min(end_s, length_s)
            samples = np.zeros(max(0, round((end - begin) * rate_hz)), np.float32)
            if container.streams.audio:
                convert = av.AudioResampler(format="fltp", layout="mono", rate=rate_hz)
                for frame in container.decode(audio=0):
                    for piece in convert.resample(frame):
                        _lay(samples, piece, begin, rate_hz)
                for piece in convert.resample(None):
                    _lay(samples, piece, begin, rate_hz)
            return samples
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, None, f"its sound cannot be decoded ({reason_of(error, path)})") from None


def _length_s(container) -> float:
    """Of the picture where there is one: a codec's last block of sound goes beyond it."""
    stream = container.streams.video[0] if container.streams.video else container.streams.audio[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _lay(samples: np.ndarray, piece, begin_s: float, rate_hz: int) -> None:
    """Put the samples of a decoded piece at their place, as far as they lie inside."""
    found = piece.to_ndarray()[0]
    place = round((float(piece.pts * piece.time_base) - begin_s) * rate_hz) if piece.pts is not None else 0
    first, last = max(place, 0), min(place + len(found), len(samples))
    if first < last:
        samples[first:last] = found[first - place : last - place]
