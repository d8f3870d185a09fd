"""What the base is pretrained on: source clips drawn in memory, their texts, and dense labels from the
renderer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import PretrainSettings
from .data.kinemoji.domains import DOMAINS, LASTING, MOTIONS
from .data.kinemoji.language import captions, text_only
from .data.kinemoji.questions import questions
from .data.kinemoji.render import render, states_at
from .data.kinemoji.scenes import sample_scene
from .data.kinemoji.sprites import SPRITES, load_sprites
from .frames.select import cover

IGNORE = -100
NOBODY = len(SPRITES)  # dense label of a patch that no sprite covers


class SourceClips(torch.utils.data.Dataset):
    """Item i is training clip number i of the source domain, drawn when asked for; nothing is stored."""

    def __init__(self, recipe: PretrainSettings):

        self.recipe, self.domain, self.sprites = recipe, DOMAINS["source"], load_sprites()

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, i: int) -> dict:

        recipe, step = self.recipe, i // self.recipe.batch_size
        vision_only = step < recipe.vision_steps
        k = recipe.vision_frames if vision_only else recipe.frames[step % len(recipe.frames)]
        scene = sample_scene(self.domain, "train", i, recipe.seed)
        rng = np.random.default_rng([scene.seed, 11])
        indices = mixed_frames(scene, k, rng)
        item = {
            "vision_only": vision_only,
            "frames": render(scene, self.sprites, indices),
            "times": (indices / (scene.frames - 1)).astype(np.float32),
        }
        item["patches"], item["cells"] = dense_labels(scene, indices)
        item["motions"], item["turns"] = event_labels(scene, indices)
        if not vision_only:
            asked = questions(scene)
            chosen = rng.permutation(len(asked))[: recipe.questions]
            language = (
                str(rng.choice(("es", "de", "fr", "zh"))) if rng.random() < recipe.foreign_share else "en"
            )
            item |= {
                "captions": [str(text) for text in rng.permutation(captions(scene))[: recipe.captions]],
                "questions": [(asked[j].text, asked[j].choices[asked[j].answer]) for j in chosen],
                "sentence": text_only(rng, language),
            }
        return item


def mixed_frames(scene, k: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted frame numbers: evenly spaced, random, dense around the events or placed on them, so that any
    later policy is in range."""
    kind = rng.choice(("uniform", "random", "events", "cover"), p=(0.4, 0.1, 0.25, 0.25))
    if kind == "cover":
        return cover(scene.frames, k, scene.events)
    if kind == "uniform":
        centres = (np.arange(k) + 0.5 + rng.uniform(-0.3, 0.3)) * scene.frames / k
        return np.clip(centres, 0, scene.frames - 1).astype(int)
    weights = np.full(scene.frames, 1.0)
    if kind == "events":
        for event in scene.events:
            weights[max(event.start - 1, 0) : event.end + 1] += 4.0
    return np.sort(rng.choice(scene.frames, size=k, replace=False, p=weights / weights.sum()))


def dense_labels(scene, indices) -> tuple[np.ndarray, np.ndarray]:
    """What the renderer knows of each patch and each cell (the 32 pixels that one visual token stands for).

    Patches: float32 ``[T, 16, 7]``: the sprite that covers most of a 16-pixel patch, if a fifth of it (72:
    nobody), then its centre offset (x, y), scale, opacity, sine and cosine of its angle. Cells: int64 ``[T,
    4]``, the sprite that covers most of the cell, if a sixth of it (72: nobody).
    """
    patches = np.zeros((len(indices), 16, 7), dtype=np.float32)
    patches[..., 0] = NOBODY
    cells = np.full((len(indices), 4), NOBODY)
    for row, t in enumerate(indices):
        most_of_patch, most_of_cell = np.full(16, 0.2), np.full(4, 1 / 6)
        for actor, (x, y, scale, opacity, angle) in states_at(scene, int(t)):
            if opacity < 0.3 or not actor.mentioned:
                continue
            half = actor.size * scale / 2
            of_patch, of_cell = _covered(x, y, half, 4), _covered(x, y, half, 2)
            where = of_patch > most_of_patch
            cells[row, of_cell > most_of_cell] = actor.sprite
            most_of_patch, most_of_cell = (
                np.maximum(of_patch, most_of_patch),
                np.maximum(of_cell, most_of_cell),
            )
            edges = np.arange(4) * 16.0
            cx, cy = (x - np.tile(edges, 4) - 8) / 16, (y - np.repeat(edges, 4) - 8) / 16
            turn = np.deg2rad(angle)
            rest = [actor.size * scale / 24, opacity, np.sin(turn), np.cos(turn)]
            pose = np.concatenate(
                [np.stack([np.full(16, actor.sprite), cx, cy], -1), np.tile(rest, (16, 1))], -1
            )
            patches[row, where] = pose[where]
    return patches, cells


def event_labels(scene, indices) -> tuple[np.ndarray, np.ndarray]:
    """What the actor of each cell did since the frame before, as far as the two frames can show it (a passing
    motion leaves no trace, so one of them must lie inside it), and whose turn that was.

    Both int64 ``[T, 4]``: the motion (12: nothing), and its place among the events these frames show, from 1
    (0: nothing).
    """
    motions, turns = np.full((len(indices), 4), len(MOTIONS)), np.zeros((len(indices), 4), dtype=np.int64)
    turn = 0
    for event in scene.events:
        actor = scene.actors[event.actor]
        shot, seen = scene.shots[actor.shot], False
        for row in range(1, len(indices)):
            before, now = int(indices[row - 1]), int(indices[row])
            inside = any(event.start <= t < event.end for t in (before, now))
            spans = shot.start <= before and before < event.end and now >= event.start and now < shot.end
            if spans and (inside or event.motion in LASTING):
                turn, seen = turn + (not seen), True
                motions[row, actor.cell], turns[row, actor.cell] = MOTIONS.index(event.motion), turn
    return motions, turns


def _covered(x: float, y: float, half: float, grid: int) -> np.ndarray:
    """Share of each of ``grid * grid`` squares of a frame under a box of side ``2 * half`` around (x, y)."""
    side = 64 / grid
    edges = np.arange(grid) * side
    across = np.clip(np.minimum(x + half, edges + side) - np.maximum(x - half, edges), 0, None) / side
    down = np.clip(np.minimum(y + half, edges + side) - np.maximum(y - half, edges), 0, None) / side
    return np.outer(down, across).ravel()


class Pack:
    """Collates items into one packed row per clip: ``prefix | caption ... | question ...``."""

    def __init__(self, tokenizer, tokens_per_frame: int):
        self.ids = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
        self.tokenizer, self.per_frame = tokenizer, tokens_per_frame
        names = [self.words(sprite.names["en"])[0] for sprite in SPRITES]
        self.names = torch.tensor([*names, IGNORE])  # by sprite; nobody has no name to learn

    def words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack([i["frames"] for i in items])).permute(0, 1, 4, 2, 3)
        batch = {
            "pixel_values": pixels.float().div_(127.5).sub_(1),
            "frame_times": torch.from_numpy(np.stack([i["times"] for i in items])),
            "patches": torch.from_numpy(np.stack([i["patches"] for i in items])),
            "motions": torch.from_numpy(np.stack([i["motions"] for i in items])).flatten(1),
            "turns": torch.from_numpy(np.stack([i["turns"] for i in items])).flatten(1),
            "names": self.names[torch.from_numpy(np.stack([i["cells"] for i in items]))].flatten(1),
        }
        if items[0]["vision_only"]:
            return batch
        s, frames = self.ids, pixels.shape[1]
        prefix = [s["<bos>"], *[s["<image>"]] * (self.per_frame * frames), s["<emb>"]]
        rows = []
        for item in items:
            parts = [([s["<cap>"]], self.words(text) + [s["<eos>"]]) for text in item["captions"]]
            for question, answer in item["questions"]:
                parts.append(
                    ([s["<qst>"], *self.words(question), s["<ans>"]], [*self.words(answer), s["<eos>"]])
                )
            rows.append(self._pack(prefix, parts))
        batch["input_ids"], batch["labels"], segment, batch["position_ids"] = self._pad(rows)
        batch["attention_mask"] = packed_mask(segment)
        text = []
        for item in items:  # read alone, a caption gives the text vector; a text-only sentence teaches words
            text.append(([s["<bos>"], *self.words(item["captions"][0]), s["<emb>"]], None))
        for item in items[::2]:
            sentence = [*self.words(item["sentence"]), s["<eos>"]]
            text.append(([s["<bos>"], s["<cap>"]], sentence))
        rows = [self._pack(head, [([], tail)] if tail else []) for head, tail in text]
        batch["text_ids"], batch["text_labels"], segment, _ = self._pad(rows)
        batch["text_mask"] = (segment >= 0).long()
        return batch

    @staticmethod
    def _pack(prefix, parts):
        ids, labels = list(prefix), [IGNORE] * len(prefix)
        segment, position = [0] * len(prefix), list(range(len(prefix)))
        for number, (given, learned) in enumerate(parts, start=1):
            ids += given + learned
            labels += [IGNORE] * len(given) + learned
            segment += [number] * (len(given) + len(learned))
            position += range(len(prefix), len(prefix) + len(given) + len(learned))
        return ids, labels, segment, position

    @staticmethod
    def _pad(rows) -> list[Tensor]:
        width = max(len(r[0]) for r in rows)
        return [
            torch.tensor([row[column] + [fill] * (width - len(row[column])) for row in rows])
            for column, fill in enumerate((0, IGNORE, -1, 0))
        ]


def packed_mask(segment: Tensor) -> Tensor:
    """Additive mask ``[B, 1, L, L]`` from segment numbers ``[B, L]`` (-1 padding): causal, and a text row
    sees the
    prefix (segment 0) and itself only."""
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    keys, queries = segment[:, None, :], segment[:, :, None]
    seen = causal & ((keys == 0) | (keys == queries))
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
