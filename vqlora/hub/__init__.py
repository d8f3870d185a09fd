"""Runs on checkpoints in the layout of the Hugging Face hub: any class of `families`, by name or folder.

    checkpoint.py   what its files say: configuration, tokenizer, chat template, numbers of its processor
    pixels.py       frames -> pixels, from those numbers, without torchvision
    families.py     per class: sizes of frames, the text that stands for them, the tensors that hold them
    prompts.py      chat template -> (given, learned) token ids
    batches.py      clips -> training batches
    evaluate.py     captions, likelihoods, questions
    run.py          one whole run
    small.py        a base of real size made here, of a pretrained decoder and the released base's tower
    study.py        the comparisons of notebook 14

The embedded base has a way of its own (`vqlora.train`), which knows nothing of this one.
"""

from __future__ import annotations

import json
from pathlib import Path


def is_hub(base: str) -> bool:
    """Whether runs on `base` are made here: any but "released" and folders that hold an embedded base."""
    if base == "released":
        return False
    try:
        return json.loads(Path(base, "config.json").read_text(encoding="utf-8"))["model_type"] != "kinevlm"
    except (OSError, ValueError, KeyError):
        return not Path(base).is_dir()  # the name of a checkpoint on the hub
