"""An optimizer in which the gates learn at their own, higher rate.

    optimizer = create_optimizer(model, lr=1e-3)
    Trainer(model, args, ..., optimizers=(optimizer, None))

The Trainer's schedule scales both rates alike, and a resumed run restores them.
"""

from __future__ import annotations

import torch
from torch import nn

GATE_RATE = 5.0  # times the adapters' rate: gates that learn at the same rate hardly move


def create_optimizer(
    model: nn.Module,
    lr: float,
    *,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **kwargs,
) -> torch.optim.Optimizer:
    """`optimizer_cls` over the trainable parameters, in the groups "adapter" and "gate".

    gate_lr: None takes five times `lr`. Gates get no weight decay. kwargs go to `optimizer_cls`.
    Raises ValueError for a model without trainable parameters and for rates that are not above 0.
    """
    gate_lr = GATE_RATE * lr if gate_lr is None else gate_lr
    for name, rate in (("lr", lr), ("gate_lr", gate_lr)):
        if not rate > 0:
            raise ValueError(f"{name}: {rate} is not above 0")
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter is trainable; load adapters with is_trainable=True")
    groups = [
        {
            "name": "adapter",
            "params": [p for name, p in trainable if not is_gate(name)],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "gate",
            "params": [p for name, p in trainable if is_gate(name)],
            "lr": gate_lr,
            "weight_decay": 0.0,
        },
    ]
    return optimizer_cls([group for group in groups if group["params"]], lr=lr, **kwargs)


def is_gate(name: str) -> bool:
    """Whether a parameter's full name is of a gate: a layer's head or the trunk its modality shares."""
    return ".lora_gate" in name
