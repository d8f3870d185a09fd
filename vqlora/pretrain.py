"""Train the embedded base from scratch: clips drawn in memory by the benchmark's own renderer, none seen twice.

Two stages in one Trainer run. First the vision tower alone, on dense labels from the renderer (which sprite covers a patch,
where its centre is, how large, turned and opaque it is). Then everything: captions, questions, retrieval, text-only
sentences, and the dense loss on. Text rows of one clip are packed behind its visual tokens: the attention mask keeps them
apart, so the frames are read once for all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import KineVLMForConditionalGeneration, build_tokenizer, small_config

IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """How the base is trained. Batches count clips over all processes; learning rates are peaks of a cosine."""

    steps: int = 1100
    vision_steps: int = 250
    batch_size: int = 48
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    seed: int = 0
    processes: int = 2
    width: int = 192
    layers: int = 4
    vision_width: int = 128
    vision_layers: int = 4
    frames: tuple[int, ...] = (5, 6, 8)  # cycled over the joint steps
    vision_frames: int = 4
    questions: int = 3  # per clip and step
    contrastive_weight: float = 0.25
    dense_weight: float = 0.5
    text_weight: float = 0.3
    foreign_share: float = 0.5  # text-only sentences in es, de, fr or zh
    save_steps: int = 100


def new_model(recipe: Recipe):
    """A fresh ``(model, tokenizer)``, weights fixed by ``recipe.seed``."""
    from .data.kinemoji.language import vocabulary

    tokenizer = build_tokenizer(vocabulary())
    config = small_config(
        len(tokenizer),
        width=recipe.width,
        layers=recipe.layers,
        vision_width=recipe.vision_width,
        vision_layers=recipe.vision_layers,
        vision_heads=recipe.vision_width // 32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return KineVLMForPretraining(config, recipe), tokenizer


class SourceClips(torch.utils.data.Dataset):
    """Item i is training clip number i of the source domain, drawn when asked for; nothing is stored."""

    def __init__(self, recipe: Recipe):
        from .data.kinemoji.domains import DOMAINS
        from .data.kinemoji.sprites import load_sprites

        self.recipe, self.domain, self.sprites = recipe, DOMAINS["source"], load_sprites()

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, i: int) -> dict:
        from .data.kinemoji.language import captions, text_only
        from .data.kinemoji.questions import questions
        from .data.kinemoji.render import render
        from .data.kinemoji.scenes import sample_scene

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
            "dense": dense_labels(scene, indices),
        }
        if not vision_only:
            asked = questions(scene)
            chosen = rng.permutation(len(asked))[: recipe.questions]
            language = str(rng.choice(("es", "de", "fr", "zh"))) if rng.random() < recipe.foreign_share else "en"
            item |= {
                "caption": str(rng.choice(captions(scene))),
                "questions": [(asked[j].text, asked[j].choices[asked[j].answer]) for j in chosen],
                "sentence": text_only(rng, language),
            }
        return item


def mixed_frames(scene, k: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted frame numbers: evenly spaced, random, or centred on the events, so that any later policy is in range."""
    kind = rng.choice(("uniform", "random", "events"), p=(0.5, 0.2, 0.3))
    if kind == "uniform":
        centres = (np.arange(k) + 0.5 + rng.uniform(-0.3, 0.3)) * scene.frames / k
        return np.clip(centres, 0, scene.frames - 1).astype(int)
    weights = np.full(scene.frames, 1.0)
    if kind == "events":
        for event in scene.events:
            weights[max(event.start - 1, 0) : event.end + 1] += 4.0
    return np.sort(rng.choice(scene.frames, size=k, replace=False, p=weights / weights.sum()))


def dense_labels(scene, indices) -> np.ndarray:
    """Float32 ``[T, 16, 7]``: sprite index of each 16-pixel patch (72: nobody), then centre offset (x, y), scale,
    opacity, sine and cosine of the angle of the sprite that covers most of the patch (if at least a fifth of it)."""
    from .data.kinemoji.render import states_at

    out = np.zeros((len(indices), 16, 7), dtype=np.float32)
    out[..., 0] = 72
    edges = np.arange(4) * 16.0
    for row, t in enumerate(indices):
        best = np.full(16, 0.2)
        for actor, (x, y, scale, opacity, angle) in states_at(scene, int(t)):
            if opacity < 0.3 or not actor.mentioned:
                continue
            half = actor.size * scale / 2
            across = np.clip(np.minimum(x + half, edges + 16) - np.maximum(x - half, edges), 0, None) / 16
            down = np.clip(np.minimum(y + half, edges + 16) - np.maximum(y - half, edges), 0, None) / 16
            cover = np.outer(down, across).ravel()
            where = cover > best
            best = np.maximum(best, cover)
            cx, cy = (x - np.tile(edges, 4) - 8) / 16, (y - np.repeat(edges, 4) - 8) / 16
            turn = np.deg2rad(angle)
            values = np.stack([np.full(16, actor.sprite), cx, cy, np.full(16, scale * actor.size / 24)], -1)
            rest = np.tile([opacity, np.sin(turn), np.cos(turn)], (16, 1))
            out[row, where] = np.concatenate([values, rest], -1)[where]
    return out


class Pack:
    """Collates items into one packed row per clip: ``prefix | caption | question | question ...``."""

    def __init__(self, tokenizer, tokens_per_frame: int):
        self.ids = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
        self.tokenizer, self.per_frame, self.cache = tokenizer, tokens_per_frame, {}

    def words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack([i["frames"] for i in items])).permute(0, 1, 4, 2, 3)
        batch = {
            "pixel_values": pixels.float().div_(127.5).sub_(1),
            "frame_times": torch.from_numpy(np.stack([i["times"] for i in items])),
            "dense": torch.from_numpy(np.stack([i["dense"] for i in items])),
        }
        if items[0]["vision_only"]:
            return batch
        s, frames = self.ids, pixels.shape[1]
        prefix = [s["<bos>"], *[s["<image>"]] * (self.per_frame * frames), s["<emb>"]]
        rows = []
        for item in items:
            parts = [([s["<cap>"]], self.words(item["caption"]) + [s["<eos>"]])]
            for question, answer in item["questions"]:
                parts.append(([s["<qst>"], *self.words(question), s["<ans>"]], [*self.words(answer), s["<eos>"]]))
            rows.append(self._pack(prefix, parts))
        batch["input_ids"], batch["labels"], segment, batch["position_ids"] = self._pad(rows)
        batch["attention_mask"] = packed_mask(segment)
        text = []
        for item in items:  # read alone, a caption gives the text vector; a text-only sentence teaches words
            text.append(([s["<bos>"], *self.words(item["caption"]), s["<emb>"]], None))
        for item in items[:: 2]:
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
    """Additive mask ``[B, 1, L, L]`` from segment numbers ``[B, L]`` (-1 padding): causal, and a text row sees the
    prefix (segment 0) and itself only."""
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    keys, queries = segment[:, None, :], segment[:, :, None]
    seen = causal & ((keys == 0) | (keys == queries))
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


class KineVLMForPretraining(KineVLMForConditionalGeneration):
    """The base plus what only pretraining needs: the dense head, the temperature and the sum of losses."""

    def __init__(self, config, recipe: Recipe = Recipe()):  # noqa: B008 - a frozen value
        super().__init__(config)
        self.recipe = recipe
        self.dense_head = nn.Linear(config.vision_width, 73 + 6)
        self.log_temperature = nn.Parameter(torch.tensor(2.5))
        self.post_init()

    def forward(self, pixel_values, frame_times, dense, input_ids=None, labels=None, position_ids=None,
                attention_mask=None, text_ids=None, text_labels=None, text_mask=None):  # fmt: skip
        recipe, read = self.recipe, super().forward
        features = self.model.vision_tower(pixel_values.flatten(0, 1))
        seen = dense_loss(self.dense_head(features), dense.flatten(0, 1))
        if input_ids is None:
            return {"loss": seen}
        visual = self.model.multi_modal_projector(features, frame_times)
        embeds = self._fill(input_ids, self.get_input_embeddings()(input_ids), visual)
        told = read(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                    use_cache=False)  # fmt: skip
        text = read(text_ids, attention_mask=text_mask, labels=text_labels, use_cache=False)
        clips = len(pixel_values)
        match = contrastive_loss(
            self.embed(told.last_hidden_state, input_ids),
            self.embed(text.last_hidden_state[:clips], text_ids[:clips]),
            self.log_temperature.exp(),
        )
        loss = (told.loss + recipe.contrastive_weight * match + recipe.dense_weight * seen
                + recipe.text_weight * text.loss)  # fmt: skip
        return {"loss": loss}


def dense_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the covering sprite plus smooth L1 of its pose where there is one."""
    sprite, pose = wanted[..., 0].long(), wanted[..., 1:]
    loss = F.cross_entropy(predicted[..., :73].flatten(0, 1), sprite.flatten())
    there = sprite < 72
    if there.any():
        loss = loss + 2 * F.smooth_l1_loss(predicted[..., 73:][there], pose[there], beta=0.1)
    return loss


def contrastive_loss(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over this process's clips and those of its peers (``[B, E]`` each, L2-normalised)."""
    rank, world = 0, 1
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather

        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        all_text, all_video = torch.cat(all_gather(text)), torch.cat(all_gather(video))
    else:
        all_text, all_video = text, video
    target = torch.arange(len(video)) + rank * len(video)
    return (F.cross_entropy(scale * video @ all_text.T, target) + F.cross_entropy(scale * text @ all_video.T, target)) / 2


def pretrain(recipe: Recipe, out: Path) -> Path:
    """Train in ``recipe.processes`` one-thread processes (resuming what is there); the model lands in ``out/model``.

    Raises RuntimeError with the last lines of the log when training fails.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(recipe.processes),
               "-m", "vqlora.pretrain", str(out)]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(f"pretraining in {out} ended with exit code {done.returncode}; its messages are above")
    return out / "model"


def _worker(out: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    stored = json.loads((out / "recipe.json").read_text())
    recipe = Recipe(**{**stored, "frames": tuple(stored["frames"])})
    model, tokenizer = new_model(recipe)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // recipe.processes,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=["tensorboard"],
        use_cpu=True,
        seed=recipe.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        dataloader_num_workers=0,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)  # clips are random already; stages are not

    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=SourceClips(recipe),
        data_collator=Pack(tokenizer, model.config.tokens_per_frame),
    )
    checkpoints = out / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    if trainer.is_world_process_zero():
        base = KineVLMForConditionalGeneration(model.config)
        base.load_state_dict(model.state_dict(), strict=False)  # less the dense head and the temperature
        base.to(torch.bfloat16).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
