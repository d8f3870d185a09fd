"""From clips to training batches. Everything random is a function of (seed, epoch, index), so nothing has a
state.

>>> data = ClipDataset(clips, store, frames=8, select="uniform", seed=0)
>>> batch = Collator(tokenizer, seed=0)([data[i] for i in shuffled(len(data), 32, seed=0)])
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from vqlora.data.cache import ArrayStore, FrameStore
from vqlora.data.clips import Clip
from vqlora.frames.container import Packets
from vqlora.frames.policies import CHANCE, Footage, Policy, policy
from vqlora.frames.reader import packets
from vqlora.frames.scores import FrameScores, score_frames

TASKS = ("caption", "question", "retrieval")
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<emb>", "<cap>", "<qst>", "<ans>")
IGNORED = -100  # a label that has no part in the loss
_FRAMES, _TEXT = 0, 1  # what a random draw is for


@dataclass(frozen=True)
class Item:
    """A clip with the frames chosen from it: `frames` uint8 `[T, H, W, 3]`, `times` float32 `[T]` in [0, 1];
    where they were asked for, the chosen frames' `features` float32 `[T, n]` (`FrameScores.features`); where
    the store has it, the clip's `sound` float32 `[S, bands]` (`vqlora.sound.bands`)."""

    clip: Clip
    frames: np.ndarray
    times: np.ndarray
    index: int
    epoch: int
    features: np.ndarray | None = None
    sound: np.ndarray | None = None


class ClipDataset(torch.utils.data.Dataset):
    """Clips with `frames` frames each, chosen by `select` (a name or a `Policy` of `vqlora.frames.policies`).

    `data[index]` is an `Item`. An index past the end means a later epoch: `data[len(data) * epoch + i]` is
    clip i as drawn in that epoch; `data.item(index, k)` is the same with k frames. Clips that the store left
    out are not in `clips`. A clip shorter than `frames` repeats frames in place, so that all items have the
    same shape. With `features`, items carry what a gate may look at: columns of the very scores that policies
    go by, computed over all frames of a clip, once. Raises ValueError when no clip is left.
    """

    def __init__(self, clips: Sequence[Clip], store: FrameStore | ArrayStore, frames: int = 8,
                 select: str | Policy = "uniform", *, seed: int = 0, features: bool = False):
        if frames < 1:
            raise ValueError(f"frames is {frames}; it must be at least 1")
        self.clips = tuple(clip for clip in clips if clip.id in store)
        if not self.clips:
            raise ValueError(f"none of the {len(clips)} clips is in the store, which left out "
                             f"{len(store.left_out)} of its own")
        self.store, self.frames, self.seed, self.select = store, frames, seed, select
        self._policy, self._with_features = policy(select), features
        self._fixed = isinstance(select, str) and select not in CHANCE
        self._chosen: dict[tuple[str, int], np.ndarray] = {}  # by clip and number of frames
        self._features: dict[str, np.ndarray] = {}
        self._sounds = getattr(store, "sounds", {})  # frames drawn in memory have none

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.frames)

    def item(self, index: int, frames: int) -> Item:
        """`self[index]`, but with as many frames as given."""
        epoch, index = divmod(int(index), len(self.clips))
        if epoch < 0:
            raise IndexError(f"clip number {index - len(self.clips)} is negative")
        clip = self.clips[index]
        shown = self.store[clip.id]
        chosen, features = self._look(clip, shown, frames, _rng(self.seed, epoch, index, _FRAMES))
        if len(chosen) < frames:
            chosen = chosen[np.arange(frames) * len(chosen) // frames]
        features = features[chosen] if features is not None else None
        times, sound = frame_times(chosen, len(shown)), self._sounds.get(clip.id)
        return Item(clip, shown[chosen], times, index, epoch, features, sound)

    def _look(self, clip: Clip, shown: np.ndarray, count: int, rng: np.random.Generator):
        """(frame numbers, features of all frames or None); pixels are scored at most once for both."""
        footage = footage_of(clip, shown)
        chosen = self._chosen.get((clip.id, count)) if self._fixed else None
        if chosen is None:
            chosen = self._policy(footage, count, rng)
            if self._fixed:
                self._chosen[clip.id, count] = chosen
        if self._with_features and clip.id not in self._features:
            self._features[clip.id] = footage.scores().features()
        return chosen, self._features.get(clip.id)


def footage_of(clip: Clip, frames: np.ndarray) -> Footage:
    """A clip with its decoded `frames` `[T, H, W, 3]`, as policies see it; scored once, when first asked."""
    known: list[FrameScores] = []

    def scores() -> FrameScores:
        if not known:
            known.append(score_frames(frames))
        return known[0]

    return Footage(f"clip {clip.id}", len(frames), scores, lambda: _packets(clip, len(frames)), clip.events)


def _packets(clip: Clip, n_frames: int) -> Packets:
    """The packets of a clip's stretch of its file. Raises ValueError where these are not its frames."""
    table = packets(clip.path)
    if clip.start_s is not None or clip.end_s is not None:
        within = (table.times_s >= (clip.start_s or 0.0)) & (table.times_s < (clip.end_s or np.inf))
        arrays = {f.name: getattr(table, f.name) for f in fields(table)}
        table = replace(table, **{name: array[within] for name, array in arrays.items() if np.ndim(array)})
    if len(table.times_s) != n_frames:
        raise ValueError(f"clip {clip.id}: {clip.path} has {len(table.times_s)} packets for {n_frames} "
                         "frames; select by 'packets' or 'keyframes' needs one each")
    return table


class Layout:
    """How rows are put together, for training and evaluation alike. All methods return lists of token ids.

    video prefix  <bos> <image> x (tokens_per_frame * T, then one for each window of sound) <emb>
    caption row   prefix <cap> caption <eos>             learned from the caption on
    question row  prefix <qst> question <ans> answer <eos>   learned from the answer on
    text row      <bos> caption <emb>

    Raises ValueError when the tokenizer lacks one of `SPECIAL_TOKENS`.
    """

    def __init__(self, tokenizer: Any, tokens_per_frame: int = 4):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token {missing[0]}; it needs {' '.join(SPECIAL_TOKENS)}")
        self.tokenizer, self.tokens_per_frame = tokenizer, tokens_per_frame
        self.pad, self.bos, self.eos, self.image, self.emb, self.cap, self.qst, self.ans = (
            vocabulary[token] for token in SPECIAL_TOKENS)
        self._known: dict[str, list[int]] = {}

    def words(self, text: str) -> list[int]:
        """Token ids of a text without special tokens; texts recur in every epoch and are tokenised once."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def prefix(self, frames: int, windows: int = 0) -> list[int]:
        return [self.bos, *[self.image] * (self.tokens_per_frame * frames + windows), self.emb]

    def caption(self, text: str) -> tuple[list[int], list[int]]:
        """What follows the prefix: (given, learned)."""
        return [self.cap], [*self.words(text), self.eos]

    def question(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """What follows the prefix: (given, learned)."""
        return [self.qst, *self.words(text), self.ans], [*self.words(answer), self.eos]

    def text(self, text: str) -> list[int]:
        return [self.bos, *self.words(text), self.emb]


class Collator:
    """Items -> tensors of one training batch of B rows.

    `pixel_values` float32 [B, T, 3, H, W] in [-1, 1]; `frame_times` float32 [B, T]; `frame_features` float32
    [B, T, n] where items have features, `sound` float32 [B, S, bands] where they have sound; `input_ids`,
    `attention_mask`, `labels` int64 [B, L], padded on the right, labels -100 where nothing is learned; with
    the task "retrieval" also `text_ids`, `text_mask` int64 [B, M]: the text row of one reference caption of
    each clip.

    A row is a question with probability `question_share` (never where the clip has none, always without the
    task "caption"), else one of the clip's reference captions in `language`; both are drawn by (seed, epoch,
    index). Raises ValueError for a clip that has no text for any task, and for frames of different sizes.
    """

    def __init__(self, tokenizer: Any, tasks: Sequence[str] = TASKS, seed: int = 0, *,
                 question_share: float = 0.4, language: str = "en", tokens_per_frame: int = 4):
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not {"caption", "question"} & set(tasks):
            raise ValueError(f"tasks {list(tasks)}: choose from {', '.join(TASKS)}, not retrieval alone")
        if not 0 <= question_share <= 1:
            raise ValueError(f"question_share is {question_share}; it must be from 0 to 1")
        self.layout = Layout(tokenizer, tokens_per_frame)
        self.tasks, self.seed, self.language = tuple(tasks), seed, language
        self.question_share = question_share if "caption" in tasks else 1.0
        if "question" not in tasks:
            self.question_share = 0.0

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        rows, texts = [], []
        for item in items:
            given, learned, text = self.draw(item)
            windows = 0 if item.sound is None else len(item.sound)
            rows.append((self.layout.prefix(len(item.frames), windows) + given, learned))
            texts.append(text)
        batch = {"pixel_values": pixels([item.frames for item in items]),
                 "frame_times": torch.from_numpy(np.stack([item.times for item in items]))}
        batch |= pad_rows(rows, self.layout.pad)
        if items[0].features is not None:
            batch["frame_features"] = torch.from_numpy(np.stack([item.features for item in items]))
        if items[0].sound is not None:
            batch["sound"] = torch.from_numpy(np.stack([item.sound for item in items]))
        if "retrieval" in self.tasks:
            padded = pad_rows([(text, []) for text in texts], self.layout.pad)
            batch |= {"text_ids": padded["input_ids"], "text_mask": padded["attention_mask"]}
        return batch

    def draw(self, item: Item) -> tuple[list[int], list[int], list[int]]:
        """(given, learned, text row) of an item; the text row is empty without the task "retrieval"."""
        clip, rng = item.clip, _rng(self.seed, item.epoch, item.index, _TEXT)
        captions = clip.captions.get(self.language, ())
        share, which, first, second = rng.random(4)
        if clip.questions and (share < self.question_share or not captions):
            question = clip.questions[int(which * len(clip.questions))]
            given, learned = self.layout.question(question.text, question.choices[question.answer])
        elif captions and "caption" in self.tasks:
            given, learned = self.layout.caption(captions[int(first * len(captions))])
        else:
            raise ValueError(f"clip {clip.id}: no text for {' or '.join(self.tasks)} in {self.language!r}")
        if "retrieval" not in self.tasks:
            return given, learned, []
        if not captions:
            raise ValueError(f"clip {clip.id}: no {self.language!r} caption to retrieve it by")
        return given, learned, self.layout.text(captions[int(second * len(captions))])


def frame_times(indices: np.ndarray, n_frames: int) -> np.ndarray:
    """When frames are shown, float32 from 0 (first frame of the clip) to 1 (last)."""
    return (np.asarray(indices) / max(n_frames - 1, 1)).astype(np.float32)


def pixels(frames: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 `[T, H, W, 3]` arrays of one shape -> float32 `[B, T, 3, H, W]` in [-1, 1]."""
    shapes = sorted({array.shape for array in frames})
    if len(shapes) > 1:
        raise ValueError(f"frames of different shapes cannot share a batch: {', '.join(map(str, shapes))}")
    batch = torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3)
    return batch.to(torch.float32, memory_format=torch.contiguous_format).mul_(2 / 255).sub_(1)


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> Mapping[str, torch.Tensor]:
    """(given, learned) rows -> `input_ids`, `attention_mask`, `labels`, int64 [B, L], padded on the right."""
    length = max(len(given) + len(learned) for given, learned in rows)
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for row, (given, learned) in enumerate(rows):
        start, end = len(given), len(given) + len(learned)
        ids[row, :start], ids[row, start:end] = given, learned
        mask[row, :end] = 1
        labels[row, start:end] = learned
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels)}


def shuffled(n_clips: int, count: int, seed: int, start: int = 0) -> np.ndarray:
    """`count` dataset indices from place `start` of an endless shuffled stream, int64.

    Each epoch is a fresh permutation and indices keep growing (`ClipDataset` reads the epoch off them), so a
    resumed run asks for the rest of the same stream.
    """
    epochs = range(start // n_clips, -(-(start + count) // n_clips))
    stream = [_rng(seed, epoch).permutation(n_clips) + epoch * n_clips for epoch in epochs]
    if not stream:
        return np.empty(0, np.int64)
    offset = start - epochs[0] * n_clips
    return np.concatenate(stream)[offset:offset + count]


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
