"""The frames that one forward shows, as its adapted layers ask for them, and what a cache keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from vqlora.adapter.features import raw_features, raw_sound_features
from vqlora.cache_rows import HELD
from vqlora.modalities.rows import FrameRows, frame_rows
from vqlora.temporal import random_features, shuffled, standardise, with_clip_means

if TYPE_CHECKING:
    from vqlora.adapter.config import VQLoraConfig


class Frames:
    """Rows and features of one forward; computed when a layer first asks: disabled adapters cost nothing.

    inputs: the forward's keyword arguments. scores: `frame_features`. shuffle_seed: for that control.
    offset: position of the first token of a layer's input in `input_ids`, where that holds a whole prompt
        of which a cache already has a part; None where the two begin together.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        scores: Tensor | None = None,
        shuffle_seed: int = 0,
    ) -> None:
        self.offset: int | None = None
        self._model, self._inputs, self._scores = model, inputs, scores
        self._shuffle_seed = shuffle_seed
        self._rows: FrameRows | None = None
        self._held: dict[str, Tensor] | None = None
        self._opened = False
        self._raw: dict[tuple, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    @property
    def rows(self) -> FrameRows | None:
        """Which frame each row shows; None without a video."""
        if not self._opened:
            if self._inputs is None:
                raise RuntimeError(
                    "no adapter that looks at frames was on during the last forward; switch adapters before "
                    "a forward, not between it and its backward"
                )
            self._rows = frame_rows(self._model, self._inputs)
            cache = self._inputs.get("past_key_values")
            if self._rows is None and _length(cache):
                self._held = getattr(cache, HELD, None)
                if self._held is None:
                    raise RuntimeError(
                        "the frames behind this key/value cache are unknown: it was not filled by this model "
                        "with its adapters on, or was put together by hand; see vqlora.adapter.take_rows"
                    )
            self._opened = True
        return self._rows

    def features(self, adapter: str, config: VQLoraConfig) -> Tensor:
        """[F + B, n] standardised features of the frames and, as their means, of the clips; where windows of
        sound are told apart [F + B + W, n], theirs behind.

        Without a video in the forward: one row per row of the cache it goes on from, else a single row of
        zeros, the average clip.
        """
        if adapter not in self._features:
            with torch.no_grad():
                self._features[adapter] = self._compute(adapter, config)
        return self._features[adapter]

    def index(self, layout: str, shape: torch.Size) -> LongTensor:
        """Rows of `features` for a layer input of `shape`: broadcastable to shape[:-1]."""
        rows = self.rows
        if rows is None:
            return self._index_of_cache(layout, shape)
        if layout == "tokens" and rows.tokens is not None:
            whole, length = rows.tokens, rows.tokens.shape[1]
            if self.offset is not None or shape[1] > length:  # behind the prompt there is text alone
                first = self.offset or 0
                text = rows.index("text", (len(whole), 1, 1)).expand(-1, max(first + shape[1] - length, 0))
                whole = torch.cat([whole, text], dim=1)[:, first : first + shape[1]]
                return whole.repeat_interleave(shape[0] // len(whole), dim=0)
        return rows.index(layout, shape)

    def row_features(self) -> dict[str, Tensor]:
        """[R, n] for each adapter that was used: what the rows of text behind this forward go on with."""
        if not self._features or self.rows is None:
            return dict(self._held or self._features)
        owner = self.rows.row_clip
        owner = torch.arange(self.rows.clips) if owner is None else owner
        return {name: f[self.rows.frames + owner.to(f.device)] for name, f in self._features.items()}

    def close(self) -> None:
        """Let go of the batch once the forward is over; what was computed stays for the backward pass."""
        self._model = self._inputs = self._scores = None

    def _index_of_cache(self, layout: str, shape: torch.Size) -> LongTensor:
        rows = 1 if self._held is None else len(next(iter(self._held.values())))
        if self._held is not None and layout not in ("tokens", "text"):
            raise RuntimeError(
                f"a layer whose rows show frames ({layout}) is called behind a key/value cache: give the "
                "forward its video again, or use generate"
            )
        if shape[0] % rows:
            raise ValueError(
                f"a key/value cache of {rows} rows is gone on from with {shape[0]}; to take rows out of a "
                "cache, use vqlora.adapter.take_rows(cache, rows)"
            )
        repeats = 1 if rows == 1 else shape[0] // rows
        return torch.arange(rows).repeat_interleave(repeats).view(-1, *[1] * (len(shape) - 2))

    def _compute(self, adapter: str, config: VQLoraConfig) -> Tensor:
        rows = self.rows
        if rows is None and self._held is None:
            return torch.zeros(1, config.feature_count)
        if rows is None:
            if adapter not in self._held:
                raise RuntimeError(f"adapter {adapter!r} was not active when this cache was filled")
            return self._held[adapter]
        key = (config.features, *config.feature_names, *config.pixel_range)
        if key not in self._raw and config.control != "random":  # several adapters often read the same
            self._raw[key] = raw_features(self._model, self._inputs, self._scores, rows, config)
        found = self._controlled(key, rows.clip, config.feature_mean, config.feature_std, config)
        found = with_clip_means(found, rows.clip, rows.clips)
        if rows.heard is None:
            return found
        key = ("sound", *config.feature_names)
        if key not in self._raw and config.control != "random":
            self._raw[key] = raw_sound_features(self._model, self._inputs, rows, config)
        heard = self._controlled(key, rows.heard, config.sound_mean, config.sound_std, config)
        return torch.cat([found, heard.to(found)])

    def _controlled(self, key: tuple, clip: LongTensor, mean, std, config: VQLoraConfig) -> Tensor:
        """Standardised features of what lies in `clip`, or what the config has instead of them."""
        if config.control == "random":
            return random_features(clip, config.feature_count, config.control_seed)
        found = standardise(self._raw[key], mean, std)
        if config.control == "shuffled":
            return shuffled(found, clip, config.control_seed + self._shuffle_seed)
        return found


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache or ())
