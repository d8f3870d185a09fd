"""One training in several processes, each with its share of every batch: what they have to do together.

    torchrun --nproc_per_node 2 -m vqlora.cli run my_run.yaml

Accelerate, inside the Trainer, joins the processes (gloo on CPU, NCCL on CUDA) and lets DDP average their
gradients. The rest is here: sums and rows over all processes, waiting, and what only the first one does. In
a process that runs alone all of it does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(RuntimeError):
    """Processes were started in a way that cannot work; the message says how to start them."""


def count() -> int:
    """How many processes train together. Raises LaunchError where a launcher promised several, but ran one.

    `accelerate launch --cpu --num_processes 2` starts a single process and leaves the others to MPI.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for name in _MPI:
        if name in os.environ:
            return int(os.environ[name])
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
        raise LaunchError(
            "`accelerate launch --cpu` started this process alone: on CPU it leaves further ones to MPI; "
            "use `torchrun --nproc_per_node N` or `accelerate launch --multi_gpu --num_processes N`"
        )
    return 1


def first() -> bool:
    """Whether this is the process that writes, evaluates and reports: the first, or the only one."""
    if count() == 1:
        return True
    join()
    return os.environ["RANK"] == "0"


def join() -> None:
    """Meet the other processes, as Accelerate does it; every function below does so when first called."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        join()
        import torch

        torch.distributed.barrier()


def told(find: Callable[[], Any]) -> Any:
    """What `find` gives in the first process, in all of them; it is called there alone."""
    if count() == 1:
        return find()
    join()
    import torch

    value = [find() if first() else None]
    torch.distributed.broadcast_object_list(value, src=0)
    return value[0]


def total(value: Tensor | float) -> Tensor | float:
    """The sum of a number over all processes, of the kind that was given."""
    if count() == 1:
        return value
    join()
    import torch
    from accelerate import PartialState

    known = isinstance(value, torch.Tensor)
    device = value.device if known else PartialState().device
    summed = torch.as_tensor(value, device=device, dtype=None if known else torch.float64).clone()
    torch.distributed.all_reduce(summed)
    return summed if known else summed.item()


def gathered(rows: Tensor) -> Tensor:
    """Rows `[B, ...]` of every process, in their order: `[B * count, ...]`.

    Gradients go back to the process of a row, summed over the losses of all. So the mean over processes, as
    DDP takes it, of the gradients of a loss that all compute alike is that loss's own gradient.
    """
    if count() == 1:
        return rows
    join()
    import torch
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def share(batch_size: int) -> int:
    """Rows of a batch that each process gets. Raises ValueError if they do not share evenly."""
    if batch_size % count():
        raise ValueError(f"batch_size: {batch_size} does not divide by {count()} processes")
    return batch_size // count()


def refuse_sharding(bits: str) -> None:
    """Raise ValueError where the launcher would shard quantized weights in a way known to corrupt them.

    FSDP shards and casts parameters as floats, while packed weights are integers that belong to scales it
    does not know (github.com/huggingface/accelerate/issues/3983): losses of 0 or NaN, and no error. ZeRO-3
    hands out pieces of each weight as it is loaded, before anything is quantized
    (github.com/bitsandbytes-foundation/bitsandbytes/issues/1249). DDP holds whole weights and is exact.
    """
    if bits == "bf16":
        return
    way_out = f"launch with DDP, where each process holds the whole {bits} base, or take bits 'bf16'"
    if _asked("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"bits: {bits!r} does not go with FSDP: sharded integer weights come apart from their scales, "
            f"and training goes wrong without an error; {way_out}"
        )
    if _zero3():
        raise ValueError(
            f"bits: {bits!r} does not go with DeepSpeed ZeRO-3: it hands out pieces of weights as they "
            f"are loaded, and what would be quantized are the pieces; take ZeRO stage 2, or {way_out}"
        )


def _zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return is_deepspeed_zero3_enabled() or _asked("ACCELERATE_USE_DEEPSPEED") and stage == "3"


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
