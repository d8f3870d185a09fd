"""The models whose training steps are compared: the embedded base, and a decoder of real size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from vqlora.cost import check

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    **check.MODELS,
    "SmolVLM-135M": partial(check.smolvlm, 288),  # 36 tokens a frame
}
