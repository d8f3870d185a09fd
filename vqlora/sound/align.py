"""A base that listens: the released one with an audio tower, which alone was taught while all else stayed.

    base = make_listening_base("build/study/base", here.profile.sound.listen)      # a folder, made once

The lesson is captions and questions about source clips, few frames of each shown, all of its sound heard. The
clips are drawn in memory from the scenes of the source's training part; no target clip is seen.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from vqlora.base import load_base
from vqlora.data.batches import Collator, Item, frame_times
from vqlora.data.kinemoji.audio import RATE_HZ, soundtrack
from vqlora.data.kinemoji.domains import DOMAINS
from vqlora.data.kinemoji.encode import FPS
from vqlora.data.kinemoji.render import render
from vqlora.data.kinemoji.scenes import sample_scene
from vqlora.data.kinemoji.sprites import load_sprites
from vqlora.data.kinemoji.write import clip_of
from vqlora.files import write_atomic
from vqlora.frames.select import uniform
from vqlora.identity import base_hash, code_hash, digest
from vqlora.kinevlm import KineVLMForConditionalGeneration
from vqlora.losses import batch_loss
from vqlora.sound.bands import BANDS, band_energies

LOSSES = "losses.json"


class DrawnClips(Dataset):
    """Item i is training clip i of the source, with `frames` frames and its sound, drawn when asked for."""

    def __init__(self, count: int, frames: int, seed: int) -> None:
        self.count, self.frames, self.seed, self.sprites = count, frames, seed, load_sprites()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        scene = sample_scene(DOMAINS["source"], "train", i, self.seed)
        chosen = uniform(scene.frames, self.frames)
        sound = band_energies(soundtrack(scene, FPS), RATE_HZ)
        clip = clip_of(scene, Path(f"{scene.id}.mp4"), ("en",))
        times = frame_times(chosen, scene.frames)
        return Item(clip, render(scene, self.sprites, chosen), times, i, 0, sound=sound)


def with_ear(
    model: KineVLMForConditionalGeneration, width: int = 128, seed: int = 0
) -> KineVLMForConditionalGeneration:
    """A copy of a KineVLM with a fresh audio tower of that width beside its own parts; `model` is left alone.

    Raises ValueError for a model that has one.
    """
    if model.config.audio_bands:
        raise ValueError(f"audio_bands: {model.config.audio_bands}; allowed: 0, a model that does not listen")
    sizes = {**model.config.to_dict(), "audio_bands": BANDS, "audio_width": width}
    config = type(model.config).from_dict(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        listening = type(model)(config).to(model.dtype)
    left = listening.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys and all(".audio_tower." in name for name in left.missing_keys)
    return listening.eval()


def align(
    model: nn.Module, data: Dataset, collator: Collator, settings, *, progress: bool = False
) -> list[float]:
    """Train the audio tower of `model` in place on `data`, in order, all else frozen; the loss of each step.

    settings: a `vqlora.experiments.ListenSettings`. The rate rises over `warmup_steps` and falls to zero.
    """
    model.requires_grad_(False)
    trained = list(model.model.audio_tower.requires_grad_(True).parameters())
    optimizer, losses = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0), []
    model.train()
    for step in tqdm(range(settings.steps), desc="learning to listen", unit="step", mininterval=1,
                     disable=not progress):  # fmt: skip
        rise = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rise * (1 - step / settings.steps)
        first = step * settings.batch_size
        batch = collator([data[first + i] for i in range(settings.batch_size)])
        loss, _ = batch_loss(model, batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval().requires_grad_(False)
    return losses


def make_listening_base(
    root: str | Path, settings, *, base: str = "released", threads: int = 1, progress: bool = True
) -> Path:
    """The folder below `root` of `base` with an audio tower that has learned; made there if it is missing.

    Its name is a hash of settings, base and code, so that it is made once for all arms and seeds. Weights are
    kept in bfloat16, as the released ones are; losses stand in `losses.json` beside them.
    """
    made_by = digest(settings.model_dump(mode="json"), base_hash(base), code_hash([__name__]), threads)
    folder = Path(root) / f"listening-{made_by}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / LOSSES).is_file():
            return folder
        torch.set_num_threads(threads)
        model, tokenizer = load_base(base)
        model = with_ear(model, settings.width, settings.seed)
        data = DrawnClips(settings.steps * settings.batch_size, settings.frames, settings.seed)
        collator = Collator(tokenizer, ("caption", "question"), settings.seed,
                            question_share=settings.question_share,
                            tokens_per_frame=model.config.tokens_per_frame)  # fmt: skip
        losses = align(model, data, collator, settings, progress=progress)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_atomic(part / LOSSES, json.dumps(losses) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    return folder
