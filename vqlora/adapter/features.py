"""Features of the frames in a forward's inputs, and the constants that standardise them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqlora.adapter.config import VQLoraConfig
from vqlora.modalities.rows import FrameRows, frame_pixels, frame_rows, sound_windows
from vqlora.temporal import frame_numbers, pixel_features, window_features

FLOOR = 1e-6  # a feature that never changes is centred, not blown up


def calibrate_features(
    model: nn.Module, config: VQLoraConfig, batches: Iterable[Mapping[str, Any]]
) -> VQLoraConfig:
    """A copy of `config` whose `feature_mean` and `feature_std` are those of all frames in `batches`, and
    `sound_mean` and `sound_std` of their windows of sound, if they have some.

    Batches are keyword arguments of the model's forward; with `features="scores"` they hold `frame_features`.
    The model itself is not run. Raises ValueError if no batch shows a frame.
    """
    frames, heard = _Moments(), _Moments()
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for batch in batches:
        inputs = dict(batch)
        scores = inputs.pop("frame_features", None)
        rows = frame_rows(model, inputs)
        if rows is None:
            continue
        frames.add(raw_features(model, inputs, scores, rows, config))
        if rows.heard is not None:
            heard.add(raw_sound_features(model, inputs, rows, config))
    if not frames.count:
        raise ValueError("batches: none of them shows a frame")
    filled = copy.copy(config)
    filled.feature_mean, filled.feature_std = frames.found()
    if heard.count:
        filled.sound_mean, filled.sound_std = heard.found()
    return filled


class _Moments:
    """Mean and standard deviation of rows [.., n] that come piece by piece."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.double().cpu()
        self.count, self.total = self.count + len(rows), self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def found(self) -> tuple[list[float], list[float]]:
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return mean.tolist(), torch.where(std > FLOOR, std, torch.ones_like(std)).tolist()


def raw_features(
    model: nn.Module,
    inputs: Mapping[str, Any],
    scores: Tensor | None,
    rows: FrameRows,
    config: VQLoraConfig,
) -> Tensor:
    """[F, n] features of a forward's frames as `config` wants them, not yet standardised."""
    if config.features == "scores":
        return scores_of_frames(scores, rows, config.feature_names)
    times = inputs.get("frame_times")
    times = times.flatten() if times is not None and times.numel() == rows.frames else None
    frames = frame_pixels(model, inputs)
    return pixel_features(frames, rows.clip, times, tuple(config.pixel_range), config.feature_names)


def raw_sound_features(
    model: nn.Module, inputs: Mapping[str, Any], rows: FrameRows, config: VQLoraConfig
) -> Tensor:
    """[W, n] features of a forward's windows of sound, by the names of the frames', not yet standardised."""
    return window_features(sound_windows(model, inputs), rows.heard, config.feature_names)


def scores_of_frames(scores: Tensor | None, rows: FrameRows, names: Sequence[str]) -> Tensor:
    """[B, T, n] features by clip to [F, n] by frame, as `rows` orders the frames.

    Raises ValueError for absent ones, wrong shapes, values that are not finite, and features of more frames
    than a clip has, unless they are 0 or NaN (padding).
    """
    if scores is None:
        raise ValueError(
            f"frame_features: this adapter reads {', '.join(names)} from the batch, and the batch has none. "
            "With the Trainer set remove_unused_columns=False; around generate use "
            "`with vqlora.frame_features(model, f): model.generate(...)`"
        )
    clip, clips = rows.clip.to(scores.device), rows.clips
    shown, of_shown = torch.unique_consecutive(clip, return_inverse=True)
    if len(scores) and len(shown) % len(scores) == 0:  # texts beside the clips have no features
        clip, clips = of_shown, len(shown)
    if scores.ndim != 3 or scores.shape[2] != len(names) or not len(scores) or clips % len(scores):
        raise ValueError(
            f"frame_features: shape {tuple(scores.shape)}; expected [B, T, {len(names)}] for B = {rows.clips}"
        )
    scores = scores.repeat_interleave(clips // len(scores), dim=0)  # beams
    number = frame_numbers(clip)
    if len(number) and int(number.max()) >= scores.shape[1]:
        raise ValueError(f"frame_features: {scores.shape[1]} a clip; one has {int(number.max()) + 1} frames")
    spare = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    spare[clip, number] = False
    if bool(scores[spare].nan_to_num().any()):
        counts = torch.bincount(clip, minlength=clips).tolist()
        raise ValueError(
            f"frame_features: {scores.shape[1]} per clip, but the clips have {counts} frames; where a model "
            "joins frames, average theirs; pad with 0"
        )
    found = scores[clip, number]
    if not bool(found.isfinite().all()):
        raise ValueError("frame_features: holds NaN or infinite values")
    return found
