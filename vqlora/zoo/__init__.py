"""Tiny random models of every supported class, and batches for them: for tests and the compatibility table.

    model = tiny_model("smolvlm")                 # two layers a part, widths that NF4 can hold, eval, float32
    batch = tiny_batch("smolvlm", model)          # two clips of three frames, forward-ready, with labels
    model(**batch).loss

Token ids: 0 padding, 1 begin, 2 end, 5 image, 6 video, 7 audio, 8 to 11 starts and ends, words after 15.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vqlora.zoo.classes import AUDIO, IMAGE, VIDEO, ZOO, Draw, Tiny

__all__ = ["AUDIO", "IMAGE", "VIDEO", "ZOO", "tiny_batch", "tiny_model"]


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the class, the same for the same seed; eval mode, float32.

    Raises KeyError for an unknown name.
    """
    tiny = _tiny(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny.build()
        for param in model.parameters():
            if param.dim() > 1:  # some classes start at 1e-10, with which nothing shows in the output
                torch.nn.init.normal_(param.data, std=0.1)
    return model.requires_grad_(True).eval()


def tiny_batch(
    name: str, model: PreTrainedModel, clips: int = 2, frames: int | Sequence[int] = 3, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of one forward: `clips` videos of `frames` frames; labels where there is a decoder.

    frames: one number, or one for each clip. Where the class joins two real frames, it gets twice as many.
    Raises ValueError for unequal numbers where the class allows none, and for X-CLIP, whose configuration
    fixes the number, for any but three.
    """
    tiny = _tiny(name)
    counts = [frames] * clips if isinstance(frames, int) else list(frames)
    if tiny.even and len(set(counts)) > 1:
        raise ValueError(f"frames: {counts}: clips of {name} in one batch have equally many frames")
    return tiny.batch(model, counts, Draw(torch.Generator().manual_seed(seed)))


def _tiny(name: str) -> Tiny:
    if name not in ZOO:
        raise KeyError(f"no tiny model {name!r}; known: {', '.join(ZOO)}")
    return ZOO[name]
