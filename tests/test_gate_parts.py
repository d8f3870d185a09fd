"""Gates on some parts of the model: the adapters of the others are plain LoRA."""

import peft
import pytest
import torch
from little_adapters import adapted as on_full
from little_adapters import batch, stir, without_labels

import vqlora
from vqlora.adapter import gated_layers
from vqlora.config import RunSettings
from vqlora.optimizer import is_gate
from vqlora.quantize import load_quantized
from vqlora.ranks import costs_of
from vqlora.settings_file import ConfigError, parse
from vqlora.store import run_key
from vqlora.zoo import tiny_model

RUN = {"experiment": "x", "arm": "vqlora", "bits": "nf4", "domain": "visual", "seed": 0,
       "learning_rate": 1e-3, "steps": 1, "train_clips": 1, "eval_clips": 1}  # fmt: skip


def adapted(bits="bf16", **settings):
    if bits == "bf16":
        return on_full(**settings)
    base = load_quantized(tiny_model("kinevlm"), bits, device="cpu", compute_dtype="fp32")
    torch.manual_seed(1)
    return peft.get_peft_model(base, vqlora.VQLoraConfig(**{"ranks": 4, **settings}))


@pytest.mark.parametrize("gate", ["scalar", "rank", "mixture", "selective"])
@pytest.mark.parametrize("parts", [("vision",), ("text", "fusion")])
def test_only_these_parts_have_gates(parts, gate):
    model = stir(adapted(gate=gate, gate_modalities=parts))
    model(**batch())
    inside = {name for name, layer in gated_layers(model) if layer.modality in parts}
    assert set(vqlora.gates(model)) == inside
    assert len(inside) < len(gated_layers(model))
    owners = {name.split(".lora_gate")[0] for name, _ in model.named_parameters() if is_gate(name)}
    assert all(any(owner.endswith(name) for name in inside) for owner in owners)
    assert bool(owners) == (gate != "selective")


@pytest.mark.parametrize("bits", ["bf16", "nf4"])
def test_the_others_are_plain_lora_bit_for_bit(bits):
    """Closing the gated part's updates leaves what plain adapters of the others alone give."""

    def without_vision(**settings):
        model = stir(adapted(bits=bits, **settings))
        for name, p in model.named_parameters():
            if ".lora_B." in name and "vision_tower" in name:
                p.data.zero_()
        return model

    inputs = without_labels(batch())
    found = without_vision(gate="rank", gate_modalities=("vision",))(**inputs).logits
    assert torch.equal(found, without_vision(gate="none")(**inputs).logits)
    assert not torch.equal(found, without_vision(gate="rank")(**inputs).logits)


def test_saved_and_loaded_again_it_gives_the_same(tmp_path):
    model = stir(adapted(bits="nf4", gate_modalities=("text",)))
    model.save_pretrained(tmp_path)
    base = load_quantized(tiny_model("kinevlm"), "nf4", device="cpu", compute_dtype="fp32")
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert list(again.peft_config["default"].gate_modalities) == ["text"]
    inputs = without_labels(batch())
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_a_constant_gate_on_a_part_merges():
    model = stir(adapted(control="constant", gate_modalities=("text",))).eval()
    inputs = without_labels(batch())
    wanted = model(**inputs).logits
    merged, _ = vqlora.merge(model, dtype=torch.float32)
    torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [("vision",), ("text",), ("vision", "fusion", "text")])
@pytest.mark.parametrize("gate", ["rank", "mixture"])
def test_a_budget_counts_the_gates_that_there_are(gate, parts):
    config = vqlora.VQLoraConfig(ranks=3, gate=gate, gate_modalities=parts)
    costs = costs_of(tiny_model("kinevlm"), config)
    model = peft.get_peft_model(tiny_model("kinevlm"), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert costs.of([3] * len(costs.slots)) == trained


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate_modalities": ("audio",)}, r"gate_modalities: .*allowed: some of vision, fusion, text"),
        ({"gate_modalities": ()}, r"gate_modalities: \(\); allowed"),
        ({"gate": "none", "gate_modalities": ("text",)}, r"gate_modalities: \('text',\) need a gate"),
    ],
)
def test_parts_without_adapters_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        vqlora.VQLoraConfig(**settings)
    with pytest.raises(ConfigError, match="gate_modalities: .*allowed"):
        parse(RunSettings, {**RUN, **settings}, "run.yaml")


def test_runs_that_gate_other_parts_are_other_runs():
    settings = (RUN, {**RUN, "gate_modalities": ["text"]})
    plain, some = (parse(RunSettings, values, "run.yaml") for values in settings)
    keys = [run_key(run, "data", "base", "code") for run in (plain, some)]
    assert keys[0] != keys[1]
