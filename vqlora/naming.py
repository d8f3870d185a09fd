"""Names and metadata of saved models: a folder says what it is and is not loaded as anything else.

{base}-{dataset}_{task}_{adapter}{rank}_{quant tag}_{head tag}
KineVLM-kinemoji.language_SFT_LoRA8_QLORA_w4_headbf16
KineVLM-kinemoji.language_SFT_VQLoRAb86k_QLORA_w4_headbf16     ranks differ: b and the trainable parameters

save_model(model, parent, describe_model(model, "KineVLM", "kinemoji.language"), tokenizer)
model, metadata = load_model(folder)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from vqlora.cost import parameter_count
from vqlora.files import write_atomic, writing
from vqlora.quantize import BITS, Precision, close_packing_trap, load_quantized

METADATA = "vqlora_metadata.json"
METHODS = {"QLORA": "LoRA", "LORA": "LoRA", "FT": "Full", "PTQ": "None"}  # method -> adapter in the name
# What a LORA or QLORA model may carry. Of Houlsby the rank is its width, of Prefix its positions.
ADAPTERS = ("LoRA", "VQLoRA", "DoRA", "Houlsby", "Prefix")
_BY_TYPE = {"VQLORA": "VQLoRA", "HOULSBY": "Houlsby", "PREFIX_TUNING": "Prefix"}  # peft type -> adapter
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
    rank: int | None  # None where ranks differ from layer to layer, and without adapters
    merged: bool
    adapter: str | None = None  # one of ADAPTERS; None takes LoRA for the methods that have adapters
    budget: int | None = None  # adapter parameters, gates included, where ranks differ
    gate: str | None = None  # of VQLoRA

    def __post_init__(self) -> None:
        for key, allowed in (("method", METHODS), ("bits", _WEIGHTS), ("head", _WEIGHTS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not known; allowed: {', '.join(allowed)}")
        adapted = METHODS[self.method] == "LoRA"
        if adapted and self.adapter is None:
            object.__setattr__(self, "adapter", "LoRA")
        if self.adapter not in (ADAPTERS if adapted else (None,)):
            raise ValueError(
                f"adapter: {self.adapter!r} does not go with method {self.method!r}; allowed: "
                + (", ".join(ADAPTERS) if adapted else "None")
            )
        if (self.gate is None) == (self.adapter == "VQLoRA"):
            raise ValueError(f"gate: {self.gate!r} does not go with adapter {self.adapter!r}")
        if (self.rank is not None) + (self.budget is not None) != adapted:
            raise ValueError(
                f"rank: {self.rank!r} does not go with method {self.method!r} and budget {self.budget!r}: "
                "adapters have one rank or, where ranks differ, a budget"
            )

    @property
    def name(self) -> str:
        """Folder name, as in the module's example; with `_merged` where adapters were merged in."""
        size = "" if self.rank is None else str(self.rank)
        size = size if self.budget is None else f"b{short_count(self.budget)}"
        adapter = (self.adapter or METHODS[self.method]) + size
        tags = f"{self.method}_{_WEIGHTS[self.bits]}_head{self.head}"
        name = f"{self.base}-{self.dataset}_{self.task}_{adapter}_{tags}"
        return re.sub(r"[^\w.+-]", "-", name) + ("_merged" if self.merged else "")


def describe_model(
    model: nn.Module, base: str, dataset: str, task: str = "SFT", *, base_source: str = ""
) -> Metadata:
    """Metadata read from the model itself: its precision, its adapters.

    For a merged model, describe it before merging, see `merged`.
    """
    precision: Precision | None = getattr(model, "vqlora_precision", None)
    bits = precision.bits if precision else _float_bits(model)
    carried, method = {"rank": None}, "FT" if precision is None else "PTQ"
    if isinstance(model, PeftModel):
        carried, method = _carried(model), "LORA" if bits in ("bf16", "fp32") else "QLORA"
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
        merged=False,
        **carried,
    )


def merged(metadata: Metadata, bits: str = "bf16") -> Metadata:
    """Of what `vqlora.merge` made from the model of `metadata`: in 16 bits, or requantized to `bits`."""
    head = bits if metadata.head == metadata.bits else "bf16"
    double = bits in ("nf4", "fp4")
    return replace(metadata, merged=True, bits=bits, head=head, base_source="", double_quant=double)


def short_count(count: int) -> str:
    """Three digits at most: 950 -> "950", 86_123 -> "86k", 2_400_000 -> "2.4M"."""
    if count < 1000:
        return str(count)
    if count < 999_500:
        return f"{count / 1e3:.0f}k"
    millions = f"{count / 1e6:.1f}" if count < 99_950_000 else f"{count / 1e6:.0f}"
    return millions.removesuffix(".0") + "M"


def _carried(model: PeftModel) -> dict:
    """The adapter's part of the metadata, from what the layers really have."""
    from vqlora.probe import adapted_layers, adapter_parameters, rank

    config, params = model.peft_config[model.active_adapter], dict(model.named_parameters())
    ranks = {rank(layer) for layer in adapted_layers(model).values()} - {0}
    ranks |= {config.num_virtual_tokens} if config.is_prompt_learning else set()
    budget = sum(parameter_count(params[name]) for name in adapter_parameters(model))
    adapter = _BY_TYPE.get(str(getattr(config.peft_type, "value", config.peft_type)), "LoRA")
    adapter = "DoRA" if getattr(config, "use_dora", False) else adapter
    return {
        "rank": next(iter(ranks)) if len(ranks) == 1 else None,
        "budget": budget if len(ranks) > 1 else None,
        "adapter": adapter,
        "gate": config.gate if adapter == "VQLoRA" else None,
    }


def base_digest(model: nn.Module) -> str:
    """16 hex digits over the input embeddings in bfloat16, which no bit width changes."""
    try:
        table = _plain(model).get_input_embeddings()
    except NotImplementedError:  # dual encoders have several; the largest is that of the words
        tables = [m for m in _plain(model).modules() if isinstance(m, nn.Embedding)]
        table = max(tables, key=lambda m: m.weight.numel())
    weight = table.weight.detach().to("cpu", torch.bfloat16)
    return hashlib.sha256(weight.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def save_model(model: nn.Module, parent: str | Path, metadata: Metadata, tokenizer=None) -> Path:
    """Save into `parent/<name>`, adapters alone for a peft model, with metadata beside; returns the folder.

    The metadata is written last and in one move: a folder without it is not a saved model. Raises WriteError
    where the disk is full.
    """
    close_packing_trap(model)
    folder = Path(parent, metadata.name)
    record = {"name": metadata.name, "quantization": _as_seed(metadata), **asdict(metadata)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METADATA).unlink(missing_ok=True)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_atomic(folder / METADATA, json.dumps(record, indent=1) + "\n")
    return folder


def recognise(folder: str | Path) -> Metadata:
    """Metadata of a saved model. Raises ValueError, naming the folder, for none or unusable ones."""
    path = Path(folder, METADATA)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        # what later versions added has defaults, so that models saved before them are still known
        needed = [f.name for f in fields(Metadata) if f.name in record or f.default is MISSING]
        metadata = Metadata(**{name: record[name] for name in needed})
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
    trainable: bool = False,
) -> tuple[nn.Module, Metadata]:
    """Load a saved model as what it is: the base in its bits with the adapters on it, or the model alone.

    base: what carries the adapters, in memory or by name; None takes the recorded source.
    trainable: whether the adapters can be trained on.
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

    if metadata.adapter == "Houlsby":
        importlib.import_module("vqlora.arms.houlsby")  # by name: other models do not depend on its code
    options = {"autocast_adapter_dtype": True, "is_trainable": trainable}
    model = PeftModel.from_pretrained(base, str(folder), **options)
    close_packing_trap(model)
    return model.eval(), metadata


def load_any(folder: str | Path, base: str | None = None, bits: str | None = None) -> nn.Module:
    """What `load_model` loads, with adapters trainable; also stock peft adapters, on `base` in `bits`.

    Raises ValueError where there is neither, and for a stock adapter whose base is not known.
    """
    if Path(folder, METADATA).is_file():
        if bits is not None:
            raise ValueError(
                f"bits: {bits!r} given, but {folder} records its own: {recognise(folder).bits!r}"
            )
        return load_model(folder, base, trainable=True)[0]
    adapters = Path(folder, "adapter_config.json")
    if not adapters.is_file():
        raise ValueError(
            f"{folder}: neither {METADATA} nor adapter_config.json: not a saved model or adapter"
        )

    base = base or json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}: a stock adapter that does not name its base; give `base`")
    carrier = load_quantized(base, bits or "nf4")
    model = PeftModel.from_pretrained(carrier, str(folder), is_trainable=True)
    close_packing_trap(model)
    return model


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
            "adapter": metadata.adapter,
            "adapter_parameters": metadata.budget,
            "gate": metadata.gate,
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
