"""QLoRA fine-tuning for video-language models.

The public names are imported when first used, and the peft method is registered as soon as peft itself is
imported, before or after this package: `import vqlora` alone loads neither torch nor peft.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

_WHERE = {
    "VQLoraConfig": "adapter",
    "allocate_ranks": "ranks",
    "audit": "auditing",
    "calibrate_features": "adapter",
    "create_optimizer": "optimizer",
    "effective_ranks": "adapter",
    "frame_features": "adapter",
    "gates": "adapter",
    "lean_step": "step",
    "load_quantized": "quantize",
    "merge": "adapter.merge",
    "plan_memory": "cost.plan",
    "register_modalities": "modalities",
    "select_frames": "frames.api",
    "watch": "adapter",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'vqlora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"vqlora.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _WithPeft(importlib.abc.MetaPathFinder):
    """Loads `vqlora.adapter` right behind peft, so that peft knows the method from the start."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_both(module):
                load(module)
                importlib.import_module("vqlora.adapter")

            spec.loader.exec_module = load_both
        return spec


if "peft" in sys.modules:
    importlib.import_module("vqlora.adapter")
else:
    sys.meta_path.insert(0, _WithPeft())
