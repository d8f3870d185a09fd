"""Features of a frozen tower, kept on disk by content: what was computed in one epoch is read in the next.

A file a frame: `folder/<hash of the tower>/<hash of the frame's inputs>.safetensors`. The hash of the tower
is over its class, its parameters and buffers with their quantization constants; that of a frame over the
bytes of every input's row. Files appear whole (written aside, then renamed): processes may share a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vqlora.cost.measure import quantization_constants
from vqlora.modalities import find_description
from vqlora.store import whole_file


class FeatureCache:
    """Reads the rows of frames it knows and computes the others, for towers that see each frame alone."""

    def __init__(self, tower: nn.Module, folder: str | Path) -> None:
        self.folder = Path(folder) / _weights_hash(tower)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.read = self.computed = 0  # frames
        self.structure = None  # of the tower's output

    @staticmethod
    def why_not(model: nn.Module, name: str) -> str | None:
        """Why features of the part `name` cannot be kept by frame, None where they can."""
        known, part = find_description(model), model.get_submodule(name)
        if known.of(name) != "vision" or known.layout(name) != "frames":
            return "its rows are not frames"
        if known.mixed(name) or any(known.mixed(f"{name}.{inner}") for inner, _ in part.named_modules()):
            return "it mixes frames"
        if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in part.modules()):
            return "it has dropout"
        return None

    def __call__(self, compute: Callable, args: tuple, kwargs: dict):
        """compute(*args, **kwargs) for tensors [F, ..] in and out; only frames that are not there are
        computed, and the first one of this object's first call, which shows how outputs are put together.
        """
        leaves, shape = tree_flatten((args, kwargs))
        rows = [x for x in leaves if _is_rows(x)]
        if len({len(x) for x in rows}) != 1:
            return compute(*args, **kwargs)
        others = repr([x for x in leaves if not _is_rows(x)])
        paths = [self._path(others, [x[i] for x in rows]) for i in range(len(rows[0]))]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        missing = missing if self.structure is not None else sorted({0, *missing})
        if missing:
            some_args, some_kwargs = tree_unflatten([x[missing] if _is_rows(x) else x for x in leaves], shape)
            made, structure = tree_flatten(compute(*some_args, **some_kwargs))
            if any(x is not None and not (_is_rows(x) and len(x) == len(missing)) for x in made):
                return compute(*args, **kwargs)
            self.structure = structure
            for place, i in enumerate(missing):
                one = {str(n): x[place].contiguous() for n, x in enumerate(made) if x is not None}
                with whole_file(paths[i]) as temporary:
                    temporary.write_bytes(save(one))
        self.computed, self.read = self.computed + len(missing), self.read + len(paths) - len(missing)
        held, device = [load(path.read_bytes()) for path in paths], rows[0].device
        merged = {key: torch.stack([one[key] for one in held]).to(device) for key in held[0]}
        return tree_unflatten([merged.get(str(n)) for n in range(self.structure.num_leaves)], self.structure)

    def _path(self, others: str, rows: list[Tensor]) -> Path:
        whole = hashlib.sha256(others.encode())
        for row in rows:
            whole.update(f"{row.dtype} {tuple(row.shape)} ".encode() + _bytes(row))
        return self.folder / f"{whole.hexdigest()[:32]}.safetensors"


def _is_rows(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _weights_hash(tower: nn.Module) -> str:
    whole = hashlib.sha256(type(tower).__qualname__.encode())
    held = [*tower.named_parameters(), *tower.named_buffers()]
    for name, tensor in held:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + _bytes(tensor))
        for constant in quantization_constants(tensor):
            whole.update(_bytes(constant))
    return whole.hexdigest()[:32]
