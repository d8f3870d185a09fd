"""Model cards of saved models: what it is, what it was trained on, how well it does, what not to expect.

    write_card("adapters/SmolVLM-...")     # README.md there; `vqlora card DIR` is the same

Beside the adapters of a run lies `vqlora_run.json` with its settings, metrics, costs and provenance; a card
of a model that was saved by hand tells what its metadata do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vqlora.files import write_atomic
from vqlora.naming import METADATA, Metadata, recognise
from vqlora.result import RunResult

RECORD = "vqlora_run.json"
METRICS = {
    "nll": "NLL (nats a token)",
    "token_accuracy_frac": "token accuracy",
    "cider": "CIDEr-D",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "qa_frac": "questions answered rightly",
    "t2v_r1": "R@1, text to video",
    "v2t_r1": "R@1, video to text",
}
RENDERED = "cc-by-sa-4.0"  # of the embedded base and of rendered clips, after their sprites


def keep_record(parent: str | Path, key: str, settings: Any, result: RunResult, made: Mapping) -> Path:
    """Write record and card beside the model that a run has just saved below `parent`; returns its folder.

    Paths of this machine are left out: a record may be published.
    """
    folder = max(Path(parent).glob(f"*/{METADATA}"), key=lambda path: path.stat().st_mtime_ns).parent
    told = settings.model_dump(mode="json", exclude={"save_to"})
    told["base"] = Path(told["base"]).name if Path(told["base"]).is_dir() else told["base"]
    if told["data"]:
        told["data"]["root"] = Path(told["data"]["root"]).name
    record = {
        "key": key,
        "settings": told,
        "metrics": result.metrics,
        "cost": result.cost,
        "provenance": dict(made),
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_card(folder)
    return folder


def has_record(parent: str | Path, key: str) -> bool:
    """Whether the model of the run with this key lies below `parent`, whole."""
    return any(
        _record(path.parent).get("key") == key and (path.parent / METADATA).is_file()
        for path in Path(parent).glob(f"*/{RECORD}")
    )


def write_card(folder: str | Path, licence: str | None = None) -> Path:
    """Write `README.md` for a saved model; returns its path.

    licence: of the adapters, by the hub's short name; None: that of rendered data where these were used, else
        "other". Raises ValueError for a folder that holds no saved model.
    """
    return write_atomic(Path(folder, "README.md"), str(make_card(folder, licence)) + "\n")


def make_card(folder: str | Path, licence: str | None = None) -> ModelCard:
    """The card as huggingface_hub's object, with its metrics as `EvalResult`s."""
    metadata, record = recognise(folder), _record(Path(folder))
    settings, metrics = record.get("settings") or {}, record.get("metrics") or {}
    data = settings.get("data") or {}
    rendered = metadata.base_source == "released" and not data
    licence = licence or (RENDERED if rendered else "other")
    results = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=data.get("format", "kinemoji"),
            dataset_name=metadata.dataset,
            dataset_split=settings.get("eval_part"),
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=round(metrics[name], 4),
        )
        for name in METRICS
        if name in metrics and metrics[name] == metrics[name]
    ]
    adapted = metadata.adapter is not None and not metadata.merged
    head = ModelCardData(
        base_model=_public_base(metadata),
        library_name="peft" if adapted else "transformers",
        license=licence,
        pipeline_tag="video-text-to-text",
        model_name=metadata.name,
        tags=["vqlora", metadata.method.lower(), metadata.bits],
        eval_results=results or None,
    )
    parts = [
        f"# {metadata.name}",
        _what(metadata, settings),
        _data(metadata, settings, metrics),
        _scores(settings, metrics),
        _limits(metadata),
        _licence(licence, metadata),
        _use(metadata, adapted),
        _made(record),
    ]
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part))


def _what(metadata: Metadata, settings: Mapping) -> str:
    if metadata.adapter:
        size = {"Houlsby": "width", "Prefix": "positions:"}.get(metadata.adapter, "rank")
        size += f" {metadata.rank}"
        size = f"{metadata.budget:,} parameters" if metadata.rank is None else size
        kind = f"{metadata.adapter} adapters ({size}) on"
    elif settings.get("arm") == "posttrain":
        kind = "Full fine-tuning, quantized only afterwards, of"
    else:
        kind = "Full fine-tuning of" if metadata.method == "FT" else "Quantized, not trained:"
    gates = ""
    if metadata.gate:
        gates = (
            " Without gates: as stock LoRA."
            if metadata.gate == "none"
            else f" Gates of kind `{metadata.gate}` weigh the adapters by what a frame differs from its clip."
        )
    double = ", constants quantized as well" if metadata.double_quant else ""
    return (
        f"{kind} {metadata.base} (`{metadata.base_type}`), whose linear layers are held in "
        f"{metadata.bits}{double}; output head in {metadata.head}, computed in {metadata.compute_dtype}."
        + gates
    )


def _data(metadata: Metadata, settings: Mapping, metrics: Mapping) -> str:
    if not settings:
        return f"## Data\n\n{metadata.dataset}; the run that trained it is not on record."
    data = settings.get("data")
    source = (
        "clips rendered by vqlora" if not data else f"format {data['format']}, protocol {data['protocol']}"
    )
    left = int(metrics.get("clips_left_out", 0))
    return (
        f"## Data\n\n{metadata.dataset} ({source}): up to {settings['train_clips']} training clips, "
        f"{settings['steps']} steps of {settings['batch_size']}, {settings['frames']} frames a clip chosen "
        f"by `{settings['select']}`, seed {settings['seed']}. {left} clips or rows could not be used."
    )


def _scores(settings: Mapping, metrics: Mapping) -> str:
    rows = [f"| {METRICS[name]} | {metrics[name]:.4g} |" for name in METRICS if name in metrics]
    if not rows:
        return ""
    return (
        f"## Scores\n\nOn {int(metrics['clips'])} clips of part `{settings['eval_part']}`, one seed.\n\n"
        "| metric | value |\n|---|---:|\n" + "\n".join(rows)
    )


def _limits(metadata: Metadata) -> str:
    lines = [
        "One run with one seed: scores of another may differ.",
        "Measured on the data above alone; nothing is known of other videos, languages or uses.",
    ]
    if metadata.base_source == "released":
        lines.append("The base has seen rendered clips of emoji only and knows their words only.")
    if metadata.adapter and metadata.bits in ("nf4", "fp4", "int8"):
        lines.append("Adapters were trained on the quantized base; on a 16-bit one their outputs differ.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(licence: str, metadata: Metadata) -> str:
    if licence == RENDERED and metadata.base_source == "released":
        return f"## Licence\n\n{licence}, as the OpenMoji drawings that base and clips are made from."
    words = "not decided" if licence == "other" else licence
    return (
        f"## Licence\n\nOf these weights: {words}. The terms of {metadata.base} and of the data hold as well."
    )


def _use(metadata: Metadata, adapted: bool) -> str:
    if not adapted or metadata.base_source == "released" or metadata.adapter == "Houlsby":
        lines = 'from vqlora.naming import load_model\nmodel, metadata = load_model("this-folder")'
        return f"## Use\n\n```python\n{lines}\n```"
    return (
        "## Use\n\n```python\nimport vqlora\nfrom peft import PeftModel\n"
        f'base = vqlora.load_quantized("{_public_base(metadata) or "the base"}", bits="{metadata.bits}")\n'
        'model = PeftModel.from_pretrained(base, "this-folder")\n```'
    )


def _made(record: Mapping) -> str:
    made = record.get("provenance") or {}
    if not made:
        return ""
    versions = ", ".join(
        f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    commit = made.get("commit") or "not known"
    return f"Run `{record['key']}`, commit {commit}; {versions}; {made.get('processor')}."


def _public_base(metadata: Metadata) -> str | None:
    """The base as others would name it: no path of this machine."""
    source = metadata.base_source
    return metadata.base if source == "released" or not source or Path(source).is_absolute() else source


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
