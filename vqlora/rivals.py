"""Published methods that choose ranks themselves, as peft has them, at the same budget as our allocators.

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) starts with half as many ranks again and masks some away while
it trains. EVA (Paischer et al. 2024, arXiv:2410.07170) takes A from the principal directions of each layer's
inputs and gives more ranks to layers whose inputs they explain better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, initialize_lora_eva_weights
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback

from vqlora.modalities import plain_name, target_modules


def configure(model: nn.Module, settings, batches) -> LoraConfig:
    """The peft config of arm "adalora" or "eva" with the uniform rank that `settings.budget` pays for.

    The scale of every layer's update is that of the other arms, `settings.alpha / settings.rank`. AdaLoRA's
    schedule is its paper's, scaled to the steps: a sixth of them at first and a third at last without change.
    Raises ValueError for a budget without a rank for every layer, and for `rslora`, which AdaLoRA lacks.
    """
    if settings.rslora:
        raise ValueError(f"rslora: {settings.rslora} does not go with arm {settings.arm!r}; allowed: False")
    names = target_modules(model, settings.modalities, settings.layers)
    price = sum(sum(_sides(model.get_submodule(name))) for name in names)
    scale, shared = settings.alpha / settings.rank, {"target_modules": names, "bias": "none"}
    if settings.arm == "eva":
        rank = _rank(settings.budget, price, "eva") + 1  # a little too much, see `begin`
        return LoraConfig(r=rank, lora_alpha=scale * rank, init_lora_weights="eva", eva_config=EvaConfig(),
                          lora_dropout=settings.dropout, **shared)  # fmt: skip
    rank = _rank(settings.budget, price + len(names), "adalora")  # a singular value for each rank
    first = -(-3 * rank // 2)
    return AdaLoraConfig(
        target_r=rank,
        init_r=first,
        lora_alpha=scale * first,
        lora_dropout=settings.dropout,
        total_step=settings.steps,
        tinit=settings.steps // 6,
        tfinal=settings.steps // 3,
        deltaT=max(1, settings.steps // 60),
        **shared,
    )


def begin(model: nn.Module, settings, batches) -> None:
    """EVA's ranks and first weights, from training batches.

    EVA counts ranks, not parameters. So it starts with a rank more in every layer than the budget pays for,
    and the last directions of the layers with most ranks, which explain least, are cut until it holds.
    """
    if settings.arm != "eva":
        return
    found = get_eva_state_dict(
        model,
        list(batches()),
        forward_fn=_forward,
        prepare_model_inputs_fn=_mask,
        prepare_layer_inputs_fn=layer_rows,
        show_progress_bar=False,
    )
    price = {name: sum(_sides(model.get_submodule(name))) for name in found}
    over = sum(len(rows) * price[name] for name, rows in found.items()) - settings.budget
    while over > 0:
        name = max(found, key=lambda name: len(found[name]))
        found[name] = found[name][:-1]
        over -= price[name]
    rows = {name: directions.clone() for name, directions in found.items()}
    initialize_lora_eva_weights(model, eva_state_dict=found)
    with torch.no_grad():  # peft makes them anew in the dtype of the base; see `baselines.attach`
        for name, directions in rows.items():
            layer = model.get_submodule(name)
            layer.lora_A["default"].to(torch.float32).weight.copy_(directions)
            layer.lora_B["default"].to(torch.float32)


def callbacks(model: nn.Module, settings) -> list:
    return [AdaLoraCallback()] if settings.arm == "adalora" else []


def ranks(model: nn.Module) -> dict[str, int]:
    """Ranks in use by full name; of AdaLoRA those that are not masked."""
    config = model.peft_config["default"]
    if not hasattr(config, "target_r"):
        layers = [(plain_name(name), m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
        return {name: layer.r["default"] for name, layer in layers}
    own = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, AdaLoraLayer)}
    kept = {_layer_of(key): sum(mask) for key, mask in (config.rank_pattern or {}).items()}
    return {name: kept.get(name, layer.r["default"]) for name, layer in own.items()}


def layer_rows(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """Rows [n, d_in] of a layer's input that EVA reads: real tokens of text [B, L, d_in], else all rows.

    peft's own picks tokens by their labels, which fits no layer of a vision tower.
    """
    x = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's reallocation after every optimizer step, which the Trainer does not do.

    Its checkpoints are not gone on from: peft cuts masked ranks out when it saves, and a new model has them
    all. So none is written, and a killed run starts again.
    Raises RuntimeError at the end if no layer's rank has changed.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = False

    def on_train_end(self, args, state, control, model=None, **kwargs):
        first = model.peft_config["default"].init_r
        if all(rank == first for rank in ranks(model).values()):
            raise RuntimeError(f"AdaLoRA: every layer still has rank {first} after {state.global_step} steps")


def _rank(budget: int, price: int, arm: str) -> int:
    if budget < price:
        raise ValueError(f"budget: {budget:,}; arm {arm!r} needs {price:,} for a rank in every layer")
    return budget // price


def _sides(layer: nn.Module) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _layer_of(key: str) -> str:
    """`base_model.model.x.lora_E.default` -> `x`, the adapter's name being there or not."""
    return plain_name(key.split(".lora_")[0].removeprefix("model.base_model.model."))


def _forward(model: nn.Module, batch: Mapping[str, Any]):
    shown = {key: value for key, value in batch.items() if not key.startswith("text_")}
    return model(**shown, use_cache=False)


def _mask(batch: Mapping[str, Any], config: LoraConfig) -> Tensor | None:
    return batch.get("attention_mask")
