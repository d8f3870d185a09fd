"""Clips -> batches for a checkpoint of the hub, as `vqlora.data.batches` makes them for the embedded base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqlora.data.batches import Collator, Item, pad_rows
from vqlora.data.clips import Clip
from vqlora.frames.manifest import check_videos
from vqlora.hub.checkpoint import Checkpoint
from vqlora.hub.families import Shown
from vqlora.hub.prompts import REQUEST, Prompts


class HubCollator(Collator):
    """Items -> the arguments of one training forward of B rows.

    `input_ids`, `attention_mask`, `labels` int64 [B, L], padded on the right, labels -100 but on answers and
    what ends them; pixels as the class wants them; `frame_features` [B, steps, n] where items have features.
    Which text a row teaches is drawn as for the embedded base: by (seed, epoch, index).

    seconds: (length of a clip, time of its last frame), by clip id.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        seconds: Mapping[str, tuple[float, float]],
        seed: int = 0,
        *,
        question_share: float = 0.4,
        language: str = "en",
        request: str = REQUEST,
    ):
        self.checkpoint, self.seconds = checkpoint, seconds
        self.layout = self.prompts = Prompts(checkpoint, request)
        self.tasks, self.seed, self.language = ("caption", "question"), seed, language
        self.question_share = question_share

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return self.rows([(item, *self.draw(item)[:2]) for item in items])

    def rows(
        self, asked: Sequence[tuple[Item, str, str]], *, left: bool = False, learned: bool = True
    ) -> dict[str, Tensor]:
        """A row for each (item, request, answer). left: padded on the left; without `learned` it ends where
        the answer begins."""
        clips, rows, lengths = [], [], []
        for item, request, answer in asked:
            pixels, shown = self.see(item)
            given, answered = self.prompts.row(shown, request, answer)
            clips.append(pixels)
            rows.append((given, answered if learned else []))
            lengths.append(shown.duration_s)
        batch = dict(pad_rows(rows, self.checkpoint.pad))
        if left:
            batch = {key: _to_the_left(value, batch["attention_mask"]) for key, value in batch.items()}
        family, numbers = self.checkpoint.family, self.checkpoint.numbers
        batch |= family.lay(clips, numbers, lengths)
        if self.checkpoint.config.model_type in _TYPED:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.prompts.token_id).int() * 2
        if asked[0][0].features is not None:
            joined = numbers["temporal_patch_size"] if family.joined else 1
            batch["frame_features"] = torch.stack([_by_step(item.features, joined) for item, *_ in asked])
        return batch

    def see(self, item: Item) -> tuple[np.ndarray, Shown]:
        duration_s, last_s = self.seconds[item.clip.id]
        return self.prompts.see(item.frames, tuple(float(t) * last_s for t in item.times), duration_s)


def clip_seconds(clips: Iterable[Clip], cache: Path) -> dict[str, tuple[float, float]]:
    """(length of a clip, time of its last frame) in seconds, by clip id, from the checks of its video."""
    clips = tuple(clips)
    checks = check_videos((clip.path for clip in clips), cache, progress=False)
    found = {}
    for clip in clips:
        check = checks.get(clip.path)
        if check is not None and check.fps:
            length = min(clip.end_s or check.duration_s, check.duration_s) - (clip.start_s or 0.0)
            found[clip.id] = (length, max(length - 1 / check.fps, 0.0))
    return found


_TYPED = ("qwen2_5_vl", "qwen3_vl")  # their positions are made from token types


def _by_step(features: np.ndarray, joined: int) -> Tensor:
    """[T, n] -> [ceil(T / joined), n]: means of the frames that make a step, the last one repeated."""
    missing = -len(features) % joined
    whole = np.concatenate([features, np.repeat(features[-1:], missing, axis=0)])
    return torch.from_numpy(whole.reshape(-1, joined, features.shape[1]).mean(axis=1))


def _to_the_left(values: Tensor, mask: Tensor) -> Tensor:
    """Each row turned so that its padding comes first."""
    shift = (mask == 0).sum(1, keepdim=True)
    places = (torch.arange(values.shape[1]) - shift) % values.shape[1]
    return values.gather(1, places)
