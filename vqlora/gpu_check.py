"""Everything that needs a GPU, tried on the one that is there: `make gpu-check`.

    check_gpu()          # name, value, unit, status: "ok" or what went wrong

The rest of the project is tested on CPU, where paging, CUDA's counters and its kernels for 4-bit weights are
not. Each check is made alone, on tiny models; one that fails does not stop the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from vqlora import cost
from vqlora.adapter import VQLoraConfig
from vqlora.optimizer import create_optimizer
from vqlora.quantize import load_quantized
from vqlora.step import lean_step
from vqlora.train import pick_optimizer
from vqlora.zoo import tiny_batch, tiny_model
from vqlora.zoo.checkpoints import tiny_checkpoint

if TYPE_CHECKING:
    import pandas as pd

NF4_ERROR = (0.05, 0.12)  # of normal weights: 0.091 where it was measured
SAME = 0.05  # relative difference of gradients that bfloat16 sums in another order may have


def check_gpu(device: str = "cuda", say: Callable[[str], None] = lambda _: None) -> pd.DataFrame:
    """A row for each check. Raises RuntimeError, in one line, where there is no such device."""
    import pandas as pd

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device here: nothing was checked")
    rows = []
    for name, (unit, check) in CHECKS.items():
        value, status = float("nan"), "ok"
        try:
            value = check(torch.device(device))
        except Exception as fault:  # whatever goes wrong is what the table is for
            status = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
        say(f"{name}: {status}")
        rows.append((name, value, unit, status))
    return pd.DataFrame(rows, columns=["name", "value", "unit", "status"])


def _memory(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory)


def _nf4_error(device: torch.device) -> float:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    back = bnb.functional.dequantize_4bit(packed, state)
    error = float((back - weight).float().norm() / weight.float().norm())
    _hold(NF4_ERROR[0] < error < NF4_ERROR[1], f"relative error of NF4 weights is {error:.3f}")
    return error


def _nf4_product(device: torch.device) -> float:
    """The 4-bit kernel against the unpacked weight's product."""
    model = _adapted(device).get_base_model()
    layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    x = torch.randn(32, layer.in_features, device=device, dtype=layer.compute_dtype)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(x.dtype)
    with torch.no_grad():
        found, wanted = layer(x), nn.functional.linear(x, weight, layer.bias)
    return _near(found, wanted, 0.02, "product with a 4-bit weight")


def _paged(device: torch.device) -> float:
    """Bytes of the state of the optimizer that 4-bit models get, after a step."""
    model = _adapted(device)
    name, reason = pick_optimizer("auto", model, device)
    _hold(name == "paged_adamw_8bit", f"{name}: {reason}")
    optimizer = create_optimizer(model, lr=1e-3, optimizer_cls=bnb.optim.PagedAdamW8bit)
    before = [p.detach().clone() for p in _trained(model)]
    for _ in range(2):  # B is zero at first: A has no gradient before the second step
        model(**_batch(model)).loss.backward()
        optimizer.step()
    _hold(optimizer.is_paged, "the optimizer's state is not paged")
    moved = [not torch.equal(old, new) for old, new in zip(before, _trained(model), strict=True)]
    _hold(any(moved), "a step changed no adapter")
    return float(cost.optimizer_bytes(optimizer))


def _counter(device: torch.device) -> float:
    """64 MiB are allocated: what the counters say."""
    found = cost.step_bytes(lambda: torch.empty(2**26, dtype=torch.uint8, device=device), device)
    _hold(2**26 <= found < 2**27, f"64 MiB were counted as {found / 2**20:.0f}")
    return float(found)


def _step_peak(device: torch.device) -> float:
    model = _adapted(device)
    batch = _batch(model)
    return float(cost.step_bytes(lambda: model(**batch).loss.backward(), device))


def _checkpoint(device: torch.device) -> float:
    """A folder in hub layout, quantized while it is loaded: its loss."""
    from vqlora.hub.checkpoint import load_model, read_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        source = str(tiny_checkpoint("qwen2_5_vl", Path(folder, "tiny")))
        read_checkpoint(source)
        model = load_model(source, SimpleNamespace(arm="qlora", bits="nf4", compute_dtype="auto"))
        _hold(next(model.parameters()).device.type == device.type, "the model is on another device")
        batch = {key: value.to(device) for key, value in tiny_batch("qwen2_5_vl", model).items()}
        with torch.no_grad():
            loss = float(model.eval()(**batch).loss)
    _hold(0 < loss < 20, f"the loss of a random model is {loss}")
    return loss


def _gates(device: torch.device) -> float:
    """Adapters without effect at the start, gates that get a gradient once they have one: their norm."""
    model, base = _adapted(device), _base(device)
    with torch.no_grad():
        same = torch.equal(model.eval()(**_batch(model)).logits, base.eval()(**_batch(base)).logits)
    _hold(same, "the adapted model differs from its base at the start")
    _shake(model)
    model.train()(**_batch(model)).loss.backward()
    norms = [float(p.grad.norm()) if p.grad is not None else 0.0 for n, p in model.named_parameters()
             if "lora_gate." in n]  # fmt: skip
    _hold(bool(norms) and all(norms), "a gate got no gradient")
    return sum(norms)


def _lean(device: torch.device) -> float:
    """Relative difference of the lean step's gradient from the plain one's, all adapters together."""
    model = _shake(_adapted(device).train())
    plain = _gradients(model)
    with lean_step(model):
        lean = _gradients(model)
    lean, plain = (torch.cat([gradient.flatten().float() for gradient in of]) for of in (lean, plain))
    return _near(lean, plain, SAME, "the gradient of the lean step")


def _generation(device: torch.device) -> float:
    """Tokens that an adapted model writes."""
    model = _adapted(device).eval()
    batch = {key: value for key, value in _batch(model).items() if key != "labels"}
    told = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return float(told.shape[1] - batch["input_ids"].shape[1])


CHECKS: dict[str, tuple[str, Callable[[torch.device], float]]] = {
    "card_memory": ("bytes", _memory),
    "nf4_error": ("fraction", _nf4_error),
    "nf4_product_difference": ("fraction", _nf4_product),
    "paged_optimizer_state": ("bytes", _paged),
    "memory_counter": ("bytes", _counter),
    "step_peak": ("bytes", _step_peak),
    "checkpoint_loss": ("nats", _checkpoint),
    "gate_gradients": ("norm", _gates),
    "lean_step_difference": ("fraction", _lean),
    "generated_tokens": ("tokens", _generation),
}


@cache
def _frozen() -> nn.Module:
    return tiny_model("smolvlm")


def _base(device: torch.device) -> nn.Module:
    import copy

    return load_quantized(copy.deepcopy(_frozen()), "nf4", device=device)


def _adapted(device: torch.device) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(_base(device), VQLoraConfig(r=4, gate="rank", modalities=("vision", "text")))


def _batch(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in tiny_batch("smolvlm", _frozen()).items()}


def _shake(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name or "lora_gate." in name:
            param.data = (torch.randn(param.shape, generator=generator) * 0.1).to(param)
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(**_batch(model)).loss.backward()
    return [param.grad.clone() for param in _trained(model)]


def _near(found: Tensor, wanted: Tensor, most: float, what: str) -> float:
    difference = float((found - wanted).float().norm() / wanted.float().norm().clamp(min=1e-12))
    _hold(difference < most, f"{what} differs by {difference:.3f} of its size")
    return difference


def _hold(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)
