"""Names and metadata of saved models: a folder says what it is and is not loaded as anything else.

{base}-{dataset}_{task}_{adapter}{rank}_{quant tag}_{head tag}
KineVLM-kinemoji.language_SFT_LoRA8_QLORA_w4_headbf16

save_model(model, parent, describe_model(model, "KineVLM", "kinemoji.language"), tokenizer)
model, metadata = load_model(folder)
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from vqlora.quantize import BITS, Precision, close_packing_trap, load_quantized

METADATA = "vqlora_metadata.json"
METHODS = {"QLORA": "LoRA", "LORA": "LoRA", "FT": "Full", "PTQ": "None"}  # method -> adapter in the name
_WEIGHTS = {"nf4": "w4", "fp4": "w4fp4", "int8": "w8", "bf16": "w16", "fp32": "w32"}


@dataclass(frozen=True)
class Metadata:
    """What a saved model is. `bits` and `head` are nf4, fp4, int8, bf16 or fp32 (full fine-tuning)."""

    base: str  # name of the base in the model's own name
    base_source: str  # what loads it: "released", a folder or a hub id; "" for a model that stands alone
    base_type: str  # transformers model type
    base_digest: str  # of the base's input embeddings in bfloat16: tells bases of one type apart
    dataset: str
    task: str
    method: str  # QLORA | LORA | FT | PTQ
    bits: str
    head: str
    backend: str
    double_quant: bool
    compute_dtype: str
    rank: int | None
    merged: bool

    def __post_init__(self) -> None:
        for key, allowed in (("method", METHODS), ("bits", _WEIGHTS), ("head", _WEIGHTS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not known; allowed: {', '.join(allowed)}")
        if (self.rank is None) == (METHODS[self.method] == "LoRA"):
            raise ValueError(f"rank: {self.rank!r} does not go with method {self.method!r}")

    @property
    def name(self) -> str:
        """Folder name, as in the module's example; with `_merged` where adapters were merged in."""
        adapter = METHODS[self.method] + ("" if self.rank is None else str(self.rank))
        tags = f"{self.method}_{_WEIGHTS[self.bits]}_head{self.head}"
        name = f"{self.base}-{self.dataset}_{self.task}_{adapter}_{tags}"
        return re.sub(r"[^\w.+-]", "-", name) + ("_merged" if self.merged else "")


def describe_model(
    model: nn.Module, base: str, dataset: str, task: str = "SFT", *, base_source: str = ""
) -> Metadata:
    """Metadata read from the model itself: its precision, its adapters.

    For a merged model, describe it before merging: `dataclasses.replace(metadata, merged=True)`.
    Raises ValueError for an adapter of several ranks.
    """
    precision: Precision | None = getattr(model, "vqlora_precision", None)
    bits = precision.bits if precision else _float_bits(model)
    rank, method = None, "FT" if precision is None else "PTQ"
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        ranks = {config.r, *config.rank_pattern.values()}
        if len(ranks) != 1:
            raise ValueError(f"rank: one adapter has the ranks {sorted(ranks)}; a name holds one")
        rank, method = config.r, "LORA" if bits == "bf16" else "QLORA"
    return Metadata(
        base=base,
        base_source=base_source,
        base_type=_plain(model).config.model_type,
        base_digest=base_digest(model),
        dataset=dataset,
        task=task,
        method=method,
        bits=bits,
        head=precision.head if precision else bits,
        backend=precision.backend if precision else "torch",
        double_quant=precision.double_quant if precision else False,
        compute_dtype=precision.compute if precision else bits,
        rank=rank,
        merged=False,
    )


def base_digest(model: nn.Module) -> str:
    """16 hex digits over the input embeddings in bfloat16, which no bit width changes."""
    weight = _plain(model).get_input_embeddings().weight.detach().to("cpu", torch.bfloat16)
    return hashlib.sha256(weight.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def save_model(model: nn.Module, parent: str | Path, metadata: Metadata, tokenizer=None) -> Path:
    """Save into `parent/<name>`, adapters alone for a peft model, with metadata beside; returns the folder.

    The metadata is written last and in one move: a folder without it is not a saved model.
    """
    close_packing_trap(model)
    folder = Path(parent, metadata.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA).unlink(missing_ok=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    part = folder / (METADATA + ".part")
    part.write_text(
        json.dumps({"name": metadata.name, "quantization": _as_seed(metadata), **asdict(metadata)}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    part.replace(folder / METADATA)
    return folder


def recognise(folder: str | Path) -> Metadata:
    """Metadata of a saved model. Raises ValueError, naming the folder, for none or unusable ones."""
    path = Path(folder, METADATA)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        metadata = Metadata(**{field.name: record[field.name] for field in fields(Metadata)})
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no {METADATA}: not a model that vqlora saved, or saved only half"
        ) from None
    except (KeyError, TypeError, ValueError) as fault:
        raise ValueError(f"{path}: not usable metadata ({fault})") from None
    if record.get("name") != metadata.name:
        raise ValueError(f"{path}: is named {record.get('name')!r}, but its metadata say {metadata.name!r}")
    return metadata


def load_model(
    folder: str | Path,
    base: str | Path | nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Metadata]:
    """Load a saved model as what it is: the base in its bits with the adapters on it, or the model alone.

    base: what carries the adapters, in memory or by name; None takes the recorded source.
    Raises ValueError if `base` is not what the adapters were trained on, naming both.
    """
    metadata = recognise(folder)
    adapters = Path(folder, "adapter_config.json").is_file()
    if not adapters:
        if metadata.bits in BITS:
            return load_quantized(str(folder), metadata.bits, device=device), metadata
        return _load_whole(folder).to(device), metadata
    if base is None:
        base = metadata.base_source
        if not base:
            raise ValueError(
                f"{folder}: adapters of {metadata.base!r} without a recorded source; give `base`"
            )
    if not isinstance(base, nn.Module):
        base = _load_whole(base)
    if getattr(base, "vqlora_precision", None) is None:
        base = load_quantized(
            base,
            metadata.bits,
            double_quant=metadata.double_quant,
            device=device,
            quantize_head=metadata.head == metadata.bits != "bf16",
        )
    check_base(metadata, base)
    model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=True)
    close_packing_trap(model)
    return model.eval(), metadata


def check_base(metadata: Metadata, base: nn.Module) -> None:
    """Raise ValueError, naming both, unless `base` is what the adapters were trained on, in the same bits."""
    precision: Precision | None = getattr(base, "vqlora_precision", None)
    have = {
        "base_type": _plain(base).config.model_type,
        "bits": precision.bits if precision else _float_bits(base),
        "base_digest": base_digest(base),
        "head": precision.head if precision else _float_bits(base),
    }
    if precision is not None and precision.bits in ("nf4", "fp4"):
        have["double_quant"] = precision.double_quant
    for key, value in have.items():
        if value != getattr(metadata, key):
            raise ValueError(
                f"{metadata.name}: {key}: trained on {getattr(metadata, key)!r} ({metadata.base}), "
                f"but this base has {value!r}"
            )


def _as_seed(metadata: Metadata) -> dict:
    """The block other tools look for: method, bits as a number, head, backend, extras."""
    number = {"w4": 4, "w4fp4": 4, "w8": 8, "w16": 16, "w32": 32}[_WEIGHTS[metadata.bits]]
    return {
        "method": metadata.method,
        "weights_bits": number,
        "lm_head_dtype": metadata.head,
        "backend": metadata.backend,
        "extras": {
            "double_quant": metadata.double_quant,
            "base_quant_type": metadata.bits,
            "compute_dtype": metadata.compute_dtype,
            "lora_r": metadata.rank,
            "merged": metadata.merged,
        },
    }


def _load_whole(source: str | Path) -> nn.Module:
    from vqlora.base import load_base

    return load_base(str(source))[0]


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _float_bits(model: nn.Module) -> str:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return "fp32" if dtype == torch.float32 else "bf16"
