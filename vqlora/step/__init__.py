"""A training step that keeps and computes less, at the same loss and gradients.

lean = vqlora.lean_step(model)     # any video-language model with peft adapters, before its Trainer
Trainer(model, ...).train()
lean.off()                         # or `with vqlora.lean_step(model):` around it
"""

from vqlora.step.switches import LeanStep, Switch, lean_step

__all__ = ["LeanStep", "Switch", "lean_step"]
