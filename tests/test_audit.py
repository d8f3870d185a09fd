"""The audit on stock peft models and on ours: each fault is made, found by name, and its remedy works."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainingArguments

from vqlora import cli
from vqlora.adapter import VQLoraConfig
from vqlora.auditing import AuditError, audit, by_modality
from vqlora.cost import static_bytes
from vqlora.faults import FAULTS
from vqlora.modalities import describe, linear_layers, target_modules
from vqlora.quantize import close_packing_trap, load_quantized
from vqlora.zoo import tiny_batch, tiny_model

NAME = "llava_onevision"
TOWER = "model.vision_tower"
LEAKY = ["q_proj", "v_proj"]


def base(bits="nf4", compute="fp32", **options):
    return load_quantized(tiny_model(NAME), bits, compute_dtype=compute, **options)


def stock(model, modalities=("vision", "text"), layers="attention", **options):
    """Plain peft LoRA on full names, weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = layers if layers == LEAKY else target_modules(model, modalities, layers)
        config = LoraConfig(r=4, target_modules=targets, **options.pop("config", {}))
        return get_peft_model(model, config, **options)


@pytest.fixture(scope="module")
def batch():
    return tiny_batch(NAME, tiny_model(NAME))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as anyone would have it."""
    path = tmp_path_factory.mktemp("stock")
    tiny_model(NAME).to(torch.bfloat16).save_pretrained(path)
    return path


def from_disk(folder, **quantization):
    """Quantized by transformers itself; the trap closed, as it is not what the caller is after."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        **quantization,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    close_packing_trap(model)
    return model


def faults(model, batch, **options):
    """name -> fault; the report must hold every one of them."""
    with pytest.raises(AuditError) as caught:
        audit(model, batch, **options)
    for fault in caught.value.faults:
        assert fault.name in FAULTS and str(fault) in str(caught.value)
    return {fault.name: fault for fault in caught.value.faults}


def test_a_sound_stock_model_gives_a_true_table_and_is_left_alone(batch):
    model = stock(base())
    model.eval()
    before = {name: param.clone() for name, param in model.named_parameters()}
    table = audit(model, batch)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert table["bytes"].sum() == static_bytes(model)["total"] - static_bytes(model)["buffers"]
    assert table["trainable"].sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = next(row for (part, _), row in table.iterrows() if part == "vision" and row["rank"])
    assert row["bits"] == "nf4" and row["rank"] == 4 and row["adapter_dtype"] == "fp32"
    assert row["rows"] == row["frame_rows"] == 2 * 3 * 16  # clips, frames, patches
    text = table.loc["text"]
    assert 0 < text["frame_rows"].max() < text["rows"].max() == batch["input_ids"].numel()
    parts = by_modality(table)
    assert parts.loc["fusion", "adapted"] == 0 and parts.loc["fusion", "gradient_norm"] == 0
    assert "nf4" in parts.loc["vision", "bits"] and parts["bytes"].sum() == table["bytes"].sum()


def test_gradient_norms_are_those_of_a_training_step(batch):
    model = stock(base())
    table = audit(model, batch)
    model.train()(**batch).loss.backward()
    norm = sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None) ** 0.5
    assert by_modality(table)["gradient_norm"].pow(2).sum() ** 0.5 == pytest.approx(float(norm), rel=1e-5)


def test_a_skip_list_that_matched_nothing(folder, batch):
    model = from_disk(folder, llm_int8_skip_modules=["vision_tower", "model.multi_modal_projector"])
    found = faults(stock(model, autocast_adapter_dtype=False), batch)
    assert set(found) == {"skip_list", "quantized"}
    assert found["skip_list"].layers == ("vision_tower",) and f"write '{TOWER}'" in found["skip_list"].text


def test_a_tower_or_head_quantized_that_should_not_be(folder, batch):
    model = from_disk(folder, llm_int8_skip_modules=[TOWER])  # drops the default for the head
    found = faults(stock(model, autocast_adapter_dtype=False), batch)
    assert set(found) == {"quantized"} and found["quantized"].layers == ("lm_head",)
    assert "load_quantized" in found["quantized"].text
    fine = from_disk(folder, llm_int8_skip_modules=[TOWER, "lm_head"])
    assert len(audit(stock(fine, autocast_adapter_dtype=False), batch, keep_16bit=["vision"]))
    found = faults(stock(base()), batch, keep_16bit=("vision",))
    assert all(layer.startswith(TOWER) for layer in found["quantized"].layers)
    with pytest.raises(ValueError, match="keep_16bit: 'vision_tower' is no part and no module path"):
        audit(stock(base()), batch, keep_16bit=("vision_tower",))


def test_a_repacked_weight_is_told_before_anything_runs(batch):
    model = stock(base())
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    layers[0].support_avx512bf16_for_cpu = True
    assert "close_packing_trap" in faults(model, batch)["repacked"].text
    close_packing_trap(model)
    audit(model, batch)
    layers[0].weight.quant_state.packing_format_for_cpu = True  # as an evaluation leaves it on such CPUs
    with pytest.raises(AuditError) as caught:
        audit(model, batch)
    assert caught.value.table is None and "load again" in str(caught.value)


def test_trainable_base_weights(batch):
    model = stock(base())
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    found = faults(model, batch, allow=("kept_graph",))
    assert set(found) == {"trainable_base"} and "modules_to_save" in found["trainable_base"].text
    meant = stock(base("bf16"), config={"modules_to_save": ["lm_head"]})
    table = audit(meant, batch, allow=("foreign_modality",))
    assert table.loc["none", "lm_head"]["trainable"] > 0


def test_a_target_ending_that_leaks_onto_the_tower(batch):
    model = stock(base(), layers=LEAKY)
    fault = faults(model, batch)["foreign_modality"]
    assert "'q_proj' put adapters on vision" in fault.text and "target_modules" in fault.text
    assert any(layer.startswith(TOWER) for layer in fault.layers)
    assert set(faults(model, batch, modalities=("text",))) == {"foreign_modality"}
    audit(model, batch, modalities=("vision", "text"))
    with pytest.raises(ValueError, match="modalities: 'sight' is not known; allowed: vision"):
        audit(model, batch, modalities=("sight",))


def test_adapters_without_a_gradient(batch, tmp_path):
    model = stock(base())
    fusion = model.get_base_model().model.multi_modal_projector
    hook = fusion.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    fault = faults(model, batch)["no_gradient"]
    assert all(layer.startswith(TOWER) for layer in fault.layers) and "does not reach the loss" in fault.text
    hook.remove()
    audit(model, batch)
    stock(base()).save_pretrained(tmp_path)
    fault = faults(PeftModel.from_pretrained(base(), tmp_path), batch)["no_gradient"]
    assert "is_trainable=True" in fault.text
    audit(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True), batch)


def test_adapters_with_a_zero_gradient(batch):
    model = stock(base("bf16"), layers=["model.language_model.layers.*.self_attn.[qkv]_proj"])
    model.get_base_model().model.language_model.layers[0].self_attn.o_proj.weight.data.zero_()
    fault = faults(model, batch)["no_gradient"]
    assert {layer.rpartition(".")[2] for layer in fault.layers} == {"q_proj", "k_proj", "v_proj"}
    assert all(".layers.0." in layer for layer in fault.layers) and "exactly zero" in fault.text


def test_float32_adapters_beside_16_bit_activations(batch):
    fault = faults(stock(base(compute="bf16")), batch)["adapter_dtype"]
    assert "autocast_adapter_dtype=False" in fault.text and "MiB" in fault.text
    table = audit(stock(base(compute="bf16"), autocast_adapter_dtype=False), batch)
    assert set(table["adapter_dtype"]) == {"", "bf16"} and set(table["compute_dtype"]) >= {"bf16"}
    allowed = audit(stock(base(compute="bf16")), batch, allow=("adapter_dtype",))
    assert allowed.attrs["allowed"][0].startswith("adapter_dtype: ")


def test_weights_that_prepare_model_for_kbit_training_made_twice_as_large(folder, batch):
    model = prepare_model_for_kbit_training(from_disk(folder), use_gradient_checkpointing=False)
    fault = faults(stock(model, autocast_adapter_dtype=False), batch)["adapter_dtype"]
    assert "twice the bytes" in fault.text and any(layer.startswith(TOWER) for layer in fault.layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_graph_kept_through_a_frozen_tower(batch, reentrant):
    model = stock(base(), modalities=("text",))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fault = faults(model, batch)["kept_graph"]
    assert fault.layers[0] == TOWER and "disable_input_require_grads" in fault.text
    sound = stock(base(), modalities=("text",))
    sound.gradient_checkpointing_enable({"use_reentrant": False})
    sound.disable_input_require_grads()
    audit(sound, batch)
    needed = stock(base(), modalities=("vision",))
    needed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    audit(needed, batch)


def gated(features="pixels", control=None, **options):
    names = {"feature_names": ("a", "b")} if features == "scores" else {}
    options = {"gate": "rank", "modalities": ("vision", "text"), "layers": "attention", "r": 4, **options}
    return get_peft_model(base(), VQLoraConfig(features=features, control=control, **names, **options))


@pytest.mark.parametrize("control", [None, "constant"])
def test_a_sound_gated_model_at_its_first_step(batch, control):
    model = gated(control=control)
    before = {name: param.clone() for name, param in model.named_parameters()}
    table = audit(model, batch)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert table["trainable"].sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.attrs["allowed"] == [] and table.attrs["loss"] == pytest.approx(float(model(**batch).loss))


def test_a_gate_that_cannot_move(batch):
    model = gated()
    heads = {name: p for name, p in model.named_parameters() if "lora_gate.default.weight" in name}
    next(iter(heads.values())).requires_grad_(False)
    fault = faults(model, batch)["stuck_gate"]
    assert len(fault.layers) == 1 and "frozen" in fault.text
    saturated = gated()
    for name, param in saturated.named_parameters():
        if "lora_gate.default.bias" in name and "language_model" in name:
            param.data.fill_(200.0)  # 2·sigmoid(200) is 2 for good
    fault = faults(saturated, batch)["stuck_gate"]
    assert all("language_model" in layer for layer in fault.layers) and "saturated" in fault.text
    blind = gated("scores")
    fault = faults(blind, {**batch, "frame_features": torch.zeros(2, 3, 2)})["stuck_gate"]
    assert all("trunk" in layer for layer in fault.layers)
    audit(blind, {**batch, "frame_features": torch.rand(2, 3, 2)})


def test_features_that_the_trainer_drops(batch, tmp_path):
    model = gated("scores")
    assert "remove_unused_columns=False" in faults(model, batch)["features"].text
    rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    rows = [{**row, "frame_features": torch.rand(3, 2)} for row in rows]
    options = dict(output_dir=str(tmp_path), per_device_train_batch_size=2, report_to="none", use_cpu=True)
    trainer = Trainer(model, TrainingArguments(**options), train_dataset=rows)
    assert set(faults(model, trainer)) == {"features"}
    kept = TrainingArguments(**options, remove_unused_columns=False)
    audit(model, Trainer(model, kept, train_dataset=rows))


def test_a_batch_of_text_alone_says_what_it_cannot_show(batch):
    text = {key: batch[key][:, -5:] for key in ("input_ids", "attention_mask", "labels")}
    found = faults(gated(), text)
    assert set(found) == {"no_gradient"} and "never ran on this batch" in found["no_gradient"].text
    audit(gated(modalities=("text",)), text)


def test_without_a_batch_nothing_runs_and_standing_faults_are_told(batch):
    table = audit(stock(base()))
    assert not table["rows"].any() and table["bytes"].sum() == audit(stock(base()), batch)["bytes"].sum()
    assert set(faults(stock(base(), layers=LEAKY), None)) == {"foreign_modality"}


def test_command(batch, tmp_path, capsys):
    model = stock(base(compute=None), autocast_adapter_dtype=False)
    tiny_model(NAME).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(batch, tmp_path / "batch.pt")
    arguments = ["audit", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    arguments += ["--batch", str(tmp_path / "batch.pt"), "--allow", "adapter_dtype"]
    assert cli.main(arguments) == 0
    assert "model.language_model.layers.1.self_attn.q_proj" in capsys.readouterr().out
    assert cli.main([*arguments, "--modalities", "text"]) == 1
    assert "foreign_modality: adapters outside text" in capsys.readouterr().err
    assert cli.main(["audit", str(tmp_path)]) == 1
    assert "not a saved model or adapter" in capsys.readouterr().err


def test_a_trainer_gives_its_own_first_batch(batch, tmp_path):
    rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    options = dict(output_dir=str(tmp_path), per_device_train_batch_size=2, report_to="none", use_cpu=True)
    trainer = Trainer(stock(base()), TrainingArguments(**options), train_dataset=rows)
    assert audit(trainer.model, trainer)["rows"].max() > 0


def test_what_cannot_be_audited_is_refused(batch):
    with pytest.raises(ValueError, match="allow: 'gradient' is not known; allowed: skip_list"):
        audit(stock(base()), batch, allow=("gradient",))
    with pytest.raises(ValueError, match="gives no loss for .*; add `labels`"):
        audit(stock(base()), {key: value for key, value in batch.items() if key != "labels"})


def test_a_layer_that_the_architecture_never_trains_is_told_with_its_reason():
    model = tiny_model("llava_next_video")
    known = describe(model)
    unread = next(name for name, _ in linear_layers(model) if known.why_never(name))
    read = target_modules(model, ("text",), "attention")[0]
    batch = tiny_batch("llava_next_video", model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=[unread, read]))
    with pytest.raises(AuditError, match="no_gradient: never trained in this architecture") as caught:
        audit(model, batch, modalities=("vision", "text"))
    assert [fault.layers for fault in caught.value.faults if fault.name == "no_gradient"] == [(unread,)]
