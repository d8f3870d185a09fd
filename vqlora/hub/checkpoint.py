"""A checkpoint as its files describe it: configuration, tokenizer, chat template, its processor's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from vqlora.baselines import WHOLE
from vqlora.hub.families import FAMILIES, Family
from vqlora.quantize import load_quantized, model_class

NESTED, VIDEO, IMAGE = "processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """`numbers` are those of its video processor or, without one, of its image processor."""

    source: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    numbers: Mapping[str, Any]
    ends: tuple[int, ...]  # ids that end an answer, by its generation settings

    @cached_property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    @property
    def pad(self) -> int:
        """The id that fills short rows; masked, so that any will do where there is none."""
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found


def read_checkpoint(source: str) -> Checkpoint:
    """Read a folder, or a hub id, in the layout that `save_pretrained` of model and processor writes.

    Raises ValueError, naming what is allowed, for a class that runs are not made for here, and for files that
    are missing.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as fault:
        raise ValueError(
            f"base: {source!r}: no configuration of a model found there ({str(fault).splitlines()[0]})"
        ) from None
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"base: {source!r} is of model type {config.model_type!r}; allowed: "
            f"released, {', '.join(FAMILIES)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast or len(tokenizer) < 2:
        raise ValueError(f"base: {source!r}: no usable tokenizer; expected tokenizer.json in it")
    ends = {tokenizer.eos_token_id, *_ends(source)} - {None}
    return Checkpoint(
        source, config, tokenizer, _template(source, tokenizer), read_numbers(source), tuple(sorted(ends))
    )


def read_numbers(source: str) -> dict[str, Any]:
    """The numbers a checkpoint's own processor goes by, from the files it would read, in its order.

    Raises ValueError where there are none.
    """
    nested = _json(source, NESTED)
    for found in (
        nested.get("video_processor"),
        _json(source, VIDEO),
        nested.get("image_processor"),
        _json(source, IMAGE),
    ):
        if found:
            return dict(found)
    raise ValueError(
        f"base: {source!r}: no {VIDEO}, {IMAGE} or {NESTED} with one in it: nothing says how its "
        "pixels are made"
    )


def load_model(source: str, settings) -> nn.Module:
    """The model of a run: frozen and in `settings.bits` from the moment it is read, or in float32 for arms
    that train every weight."""
    if settings.arm not in WHOLE:
        return load_quantized(source, settings.bits, compute_dtype=settings.compute_dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls = model_class(AutoConfig.from_pretrained(source))
    return cls.from_pretrained(source, dtype=torch.float32).to(device)


def _json(source: str, name: str) -> dict[str, Any]:
    path = _file(source, name)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _file(source: str, name: str) -> Path | None:
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _template(source: str, tokenizer) -> str | None:
    """The chat template of the processor, else of the tokenizer; None where there is none."""
    written = _file(source, "chat_template.jinja")
    if written:
        return written.read_text(encoding="utf-8")
    return _json(source, "chat_template.json").get("chat_template") or tokenizer.chat_template


def _ends(source: str) -> list[int]:
    try:
        found = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        return []
    return found if isinstance(found, list) else [found]
