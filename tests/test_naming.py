import json
from dataclasses import asdict, replace

import pytest
import torch
from peft import get_peft_model
from settings_like import settings_like

from vqlora.adapter import VQLoraConfig
from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.naming import (
    METADATA,
    Metadata,
    check_base,
    describe_model,
    load_model,
    merged,
    recognise,
    save_model,
    short_count,
)
from vqlora.quantize import load_quantized

IDS = torch.tensor([[1, 9, 10, 11, 5]])


def trained(arm, bits):
    settings = settings_like(arm, bits)
    model = attach(prepare(tiny()[0], settings), settings)
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model.eval()


@pytest.mark.parametrize(
    "arm,bits,name",
    [
        ("qlora", "nf4", "KineVLM-kinemoji.language_SFT_LoRA4_QLORA_w4_headbf16"),
        ("qlora", "int8", "KineVLM-kinemoji.language_SFT_LoRA4_QLORA_w8_headbf16"),
        ("lora", "bf16", "KineVLM-kinemoji.language_SFT_LoRA4_LORA_w16_headbf16"),
        ("full", "bf16", "KineVLM-kinemoji.language_SFT_Full_FT_w32_headfp32"),
        ("frozen", "fp4", "KineVLM-kinemoji.language_SFT_None_PTQ_w4fp4_headbf16"),
    ],
)
def test_names_and_round_trip(tmp_path, arm, bits, name):
    model = trained(arm, bits)
    metadata = describe_model(model, "KineVLM", "kinemoji.language")
    assert metadata.name == name
    folder = save_model(model, tmp_path, metadata, tiny()[1])
    assert folder == tmp_path / name and recognise(folder) == metadata
    adapters = arm in ("lora", "qlora")
    again, read = load_model(folder, tiny()[0] if adapters else None, device="cpu")
    assert read == metadata
    assert torch.equal(again.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
    block = json.loads((folder / METADATA).read_text())["quantization"]
    assert block["method"] == metadata.method and block["weights_bits"] in (4, 8, 16, 32)


def test_a_base_that_is_not_the_one_is_refused_naming_both(tmp_path):
    model = trained("qlora", "nf4")
    metadata = describe_model(model, "KineVLM", "kinemoji.language")
    folder = save_model(model, tmp_path, metadata)
    with pytest.raises(ValueError, match=r"bits: trained on 'nf4' \(KineVLM\), but this base has 'fp4'"):
        load_model(folder, load_quantized(tiny()[0], "fp4"))
    with pytest.raises(
        ValueError, match="base_digest: trained on '[0-9a-f]{16}'.* but this base has '[0-9a-f]{16}'"
    ):
        load_model(folder, tiny(seed=1)[0])
    with pytest.raises(ValueError, match="double_quant: trained on True"):
        check_base(metadata, load_quantized(tiny()[0], "nf4", double_quant=False))
    with pytest.raises(ValueError, match="without a recorded source; give `base`"):
        load_model(folder)


def test_merged_model_is_marked_and_loads_alone(tmp_path):
    model = trained("lora", "bf16")
    metadata = describe_model(model, "KineVLM", "kinemoji.language")
    merged = model.merge_and_unload()
    folder = save_model(merged, tmp_path, replace(metadata, merged=True))
    assert folder.name.endswith("_LoRA4_LORA_w16_headbf16_merged")
    again, read = load_model(folder, device="cpu")
    assert read.merged and torch.equal(again.eval()(IDS).logits, merged.eval()(IDS).logits)


def gated(ranks):
    config = VQLoraConfig(gate="rank", modalities=("vision", "text"), layers="attention", ranks=ranks)
    model = get_peft_model(load_quantized(tiny()[0], "nf4"), config)
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_B" in name or "lora_gate." in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model.eval()


@pytest.mark.parametrize("ranks,size", [(4, "4"), ({"vision": 2, "text": 8}, "b11k")])
def test_gated_adapters_with_one_rank_or_allocated_ones(tmp_path, ranks, size):
    model = gated(ranks)
    metadata = describe_model(model, "KineVLM", "kinemoji.language")
    assert metadata.name == f"KineVLM-kinemoji.language_SFT_VQLoRA{size}_QLORA_w4_headbf16"
    assert metadata.gate == "rank"
    if metadata.budget:
        assert metadata.budget == sum(p.numel() for p in model.parameters() if p.requires_grad)
    folder = save_model(model, tmp_path, metadata)
    again, read = load_model(folder, tiny()[0], device="cpu")
    inputs = {"input_ids": torch.tensor([[1, *[4] * 8, 5, 9]]), "pixel_values": torch.rand(1, 2, 3, 64, 64)}
    assert read == metadata and torch.equal(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="base_digest: trained on '.*' .*, but this base has '"):
        load_model(folder, tiny(seed=1)[0])
    whole = merged(metadata)
    assert whole.name == f"KineVLM-kinemoji.language_SFT_VQLoRA{size}_QLORA_w16_headbf16_merged"
    assert merged(metadata, "nf4").name == metadata.name + "_merged"


def test_counts_are_short_in_names():
    counts = {
        86_123: "86k",
        2_000_000: "2M",
        2_449_000: "2.4M",
        999_600: "1M",
        99_960_000: "100M",
        950: "950",
    }
    assert {count: short_count(count) for count in counts} == counts


def test_metadata_of_an_earlier_version_is_still_known(tmp_path):
    metadata = describe_model(trained("qlora", "nf4"), "KineVLM", "kinemoji.language")
    record = {"name": metadata.name, **asdict(metadata)}
    for key in ("adapter", "budget", "gate"):
        del record[key]
    (tmp_path / METADATA).write_text(json.dumps(record))
    assert recognise(tmp_path) == metadata


def test_metadata_that_cannot_be_right_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a model that vqlora saved, or saved only half"):
        recognise(tmp_path)
    metadata = describe_model(trained("qlora", "nf4"), "KineVLM", "x y/z")
    assert metadata.name.startswith("KineVLM-x-y-z_SFT_")
    for change, message in (
        (dict(bits="nf3"), "bits: 'nf3'"),
        (dict(rank=None), "rank: None does not go with"),
        (dict(method="SFT"), "method: 'SFT'"),
        (dict(method="FT"), "adapter: 'LoRA' does not go with method 'FT'"),
        (dict(adapter="LoHa"), "adapter: 'LoHa' .* allowed: LoRA, VQLoRA, DoRA"),
        (dict(adapter="VQLoRA"), "gate: None does not go with adapter 'VQLoRA'"),
        (dict(budget=5), "rank: 4 does not go with .* budget 5"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(metadata, **change)
    record = {"name": "else", **{key: getattr(metadata, key) for key in Metadata.__dataclass_fields__}}
    (tmp_path / METADATA).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is named 'else', but its metadata say 'KineVLM"):
        recognise(tmp_path)
    (tmp_path / METADATA).write_text("{")
    with pytest.raises(ValueError, match="not usable metadata"):
        recognise(tmp_path)
