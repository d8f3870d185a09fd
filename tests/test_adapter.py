"""Settings, several adapters on one model, features and controls, odd batches, what can be read off."""

import copy
import json
import math

import peft
import pytest
import torch
from little_adapters import adapted, batch, gradients, stir, table, without_labels

import vqlora
from vqlora.adapter import FrameContext, gated_layers
from vqlora.base import small_config
from vqlora.kinevlm import KineVLMForConditionalGeneration
from vqlora.modalities import plain_name, target_modules
from vqlora.optimizer import is_gate
from vqlora.zoo import tiny_model

# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate": "row"}, "gate: 'row' is not known; allowed: none, scalar"),
        ({"features": "sound"}, "features: 'sound'.*allowed: pixels, scores"),
        ({"control": "none"}, "control: 'none'.*allowed: None, constant"),
        ({"gate": "none", "control": "random"}, "control: 'random' needs a gate"),
        ({"modalities": ("visual",)}, "modalities: 'visual'.*allowed: vision, fusion"),
        ({"ranks": -1}, "ranks: -1 is not a rank"),
        ({"ranks": {"vision": 2.5}}, "ranks: 2.5 is not a rank"),
        ({"feature_names": ("colour",)}, "colour.*no pixel feature"),
        ({"feature_mean": (0.0,)}, "feature_mean: 1 values for 6"),
        ({"feature_std": (0.0,) * 6}, "feature_std: 0.0 of 'motion'"),
        ({"gate": "selective", "selective_feature": "x"}, "selective_feature: 'x' is not among"),
        ({"target_modules": "all-linear"}, "target_modules: 'all-linear' would match endings"),
        ({"use_dora": True}, "use_dora: True cannot be combined"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"pixel_range": (1, 0)}, "pixel_range"),
    ],
)
def test_bad_settings_are_told_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        vqlora.VQLoraConfig(**settings)


def test_ranks_that_nobody_allocated_are_refused_with_the_call_that_does():
    with pytest.raises(ValueError, match="'gradient'.*vqlora.allocate_ranks"):
        adapted(ranks="gradient", budget=90_000)


def test_ranks_by_modality_pattern_and_name():
    last = "model.language_model.layers.1.mlp.down_proj"
    model = adapted(
        r=3,
        ranks={"vision": 2, "model.vision_tower.layers.0": 0, "*.layers.1.mlp.*": 6, last: 8},
        modalities=("vision", "text"),
    )
    ranks = {name: layer.r["default"] for name, layer in gated_layers(model)}
    assert not any(name.startswith("model.vision_tower.layers.0.") for name in ranks)
    assert ranks["model.vision_tower.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.vision_tower.layers.1.mlp.fc1"] == 6
    assert ranks["model.language_model.layers.0.mlp.up_proj"] == 3  # not named: r
    assert ranks[last] == 8
    with pytest.raises(ValueError, match="ranks: 'model.nowhere' matches no layer"):
        adapted(ranks={"model.nowhere": 2})
    with pytest.raises(ValueError, match="rank 0"):
        adapted(ranks=0)


def test_what_is_saved_names_every_layer_in_full(tmp_path):
    model = adapted(modalities=("vision", "fusion", "text"), ranks={"text": 2, "vision": 5})
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(target_modules(tiny_model("kinevlm")))
    assert saved["peft_type"] == "VQLORA" and len(saved["feature_mean"]) == 6
    again = peft.PeftModel.from_pretrained(tiny_model("kinevlm"), tmp_path)
    ranks = [{name: layer.r["default"] for name, layer in gated_layers(m)} for m in (model, again)]
    assert set(ranks[0].values()) == {2, 5, 8} and ranks[0] == ranks[1]


def test_adapters_of_another_base_are_refused(tmp_path):
    adapted(modalities=("vision",)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llava_onevision has no linear layer.*another base"):
        peft.PeftModel.from_pretrained(tiny_model("llava_onevision"), tmp_path)


def test_targets_outside_the_named_modalities_are_refused():
    names = ["model.vision_tower.layers.0.mlp.fc1"]
    with pytest.raises(ValueError, match="fc1' is vision and modalities are .'text'"):
        adapted(target_modules=names, modalities=("text",))


def test_attention_layers_alone_or_patterns():
    layers = [name for name, _ in gated_layers(adapted(layers="attention", modalities=("text",)))]
    assert layers and all("self_attn" in name for name in layers)
    layers = [name for name, _ in gated_layers(adapted(layers=["*.1.mlp.fc1"], modalities=("vision",)))]
    assert layers == ["model.vision_tower.layers.1.mlp.fc1"]


# One model, several adapters


def test_each_adapter_has_its_own_gate_and_can_be_switched_saved_and_deleted(tmp_path):
    model, inputs = stir(adapted()), batch()
    first = model(**inputs).logits
    model.add_adapter(
        "other", vqlora.VQLoraConfig(ranks=2, gate="scalar", modalities=("text",), control="random")
    )
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("other")
    second = stir(model, only="other")(**inputs).logits
    assert not torch.equal(second, first)
    shapes = {tuple(g.shape) for g in vqlora.gates(model).values()}
    assert shapes == {(6, 1)} and all("language_model" in name for name in vqlora.gates(model))
    assert all(".other." in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, tiny_model("kinevlm")(**inputs).logits)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model("kinevlm"), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(again(**inputs).logits, first)
    again.set_adapter("other")
    assert torch.equal(again(**inputs).logits, second)
    again.delete_adapter("default")
    assert torch.equal(again(**inputs).logits, second)
    plain = tiny_model("kinevlm")
    plain.load_adapter(str(tmp_path))  # transformers' own way in
    assert torch.equal(plain(**inputs).logits, first)


def test_a_copy_has_its_own_frames_and_unloading_leaves_the_base_as_it_was():
    model, inputs = stir(adapted()), batch()
    wanted = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert FrameContext.of(twin) is not FrameContext.of(model)
    assert torch.equal(twin(**inputs).logits, wanted)
    base = model.unload()
    assert torch.equal(base(**inputs).logits, tiny_model("kinevlm")(**inputs).logits)
    assert not base._forward_pre_hooks and not base._forward_hooks and "generate" not in vars(base)
    with pytest.raises(ValueError, match="has no VQLoRA adapter"):
        vqlora.gates(base)


def test_a_constant_gate_merges_and_any_other_is_refused():
    model, inputs = stir(adapted(control="constant")), batch()
    wanted = model(**inputs).logits
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="differs from frame to frame.*vqlora.merge"):
        stir(adapted(gate="mixture")).merge_and_unload()


def test_a_batch_of_several_adapters_is_refused():
    model = adapted().eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**without_labels(batch()), adapter_names=["default", "__base__"])


# Features and controls


def test_scores_come_with_the_batch_around_it_or_are_missed_aloud():
    settings = {"features": "scores", "feature_names": ("a", "b")}
    model, inputs = stir(adapted(**settings)), batch()
    f = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    given = table(model, **inputs, frame_features=f)
    with vqlora.frame_features(model, f):
        assert torch.equal(table(model, **inputs), given)
    with pytest.raises(ValueError, match="remove_unused_columns=False.*with vqlora.frame_features"):
        model(**inputs)
    for wrong, message in (
        (f[:, :2], "2 a clip; one has 3 frames"),
        (f[..., :1], r"expected \[B, T, 2\]"),
        (torch.cat([f, f], 1), r"clips have \[3, 3\] frames"),
        (f * math.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, frame_features=wrong)
    padded = torch.cat([f, torch.full((2, 1, 2), math.nan)], dim=1)
    assert torch.equal(table(model, **inputs, frame_features=padded), given)


def test_pixel_features_do_not_depend_on_the_company():
    model, inputs = stir(adapted()), batch()
    together = table(model, **inputs)
    alone = table(model, **{key: value[1:] for key, value in inputs.items()})
    torch.testing.assert_close(together[3:], alone, rtol=0, atol=1e-5)


def test_a_constant_control_has_all_parameters_and_one_gate():
    gated, constant = adapted(), stir(adapted(control="constant"))
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in constant.parameters())
    constant(**batch()).loss.backward()
    assert table(constant, **batch()).shape[0] == 1
    assert all(grad.any() for name, grad in gradients(constant).items() if is_gate(name))


def test_shuffled_features_repeat_in_evaluation_and_change_in_training():
    model, inputs = stir(adapted(control="shuffled")), batch(frames=5)
    plain = table(stir(adapted()), **inputs)
    once = table(model.eval(), **inputs)
    assert torch.equal(once, table(model, **inputs)) and not torch.equal(once, plain)
    assert torch.allclose(once[:5].sort(0).values, plain[:5].sort(0).values)  # the clip's own features
    model.train()
    torch.manual_seed(0)
    assert len({table(model, **inputs).sum(1).argmax().item() for _ in range(12)}) > 1


def test_random_features_tell_frames_by_their_number_alone():
    g = table(stir(adapted(control="random")), **batch())
    assert torch.equal(g[:3], g[3:]) and not torch.equal(g[0], g[1])


def test_selected_frames_alone_are_adapted():
    settings = {"gate": "selective", "features": "scores", "feature_names": ("a",), "selective_feature": "a"}
    model, inputs = stir(adapted(modalities=("vision",), **settings)), batch()
    f = torch.tensor([[[1.0], [-1.0], [1.0]], [[-1.0], [-1.0], [0.0]]])
    assert table(model, **inputs, frame_features=f).flatten().tolist() == [1, 0, 1, 0, 0, 1]
    seen = {}
    tower = model.get_base_model().model.vision_tower
    hook = tower.register_forward_hook(lambda m, a, out: seen.update(out=out))
    model(**inputs, frame_features=f)
    hook.remove()
    base = tiny_model("kinevlm").model.vision_tower(inputs["pixel_values"].flatten(0, 1))
    same = (seen["out"] == base).flatten(1).all(1)
    assert same.tolist() == [False, True, False, True, True, False]


def test_calibrated_constants_standardise_the_features():
    model, inputs = tiny_model("kinevlm"), batch(frames=6)
    config = vqlora.calibrate_features(model, vqlora.VQLoraConfig(ranks=2), [inputs, batch(seed=7)])
    assert config.feature_mean != vqlora.VQLoraConfig().feature_mean
    model = peft.get_peft_model(model, config)
    frames = FrameContext.of(model)
    model(**inputs)
    f = frames.frames.features("default", config)[:12]
    assert bool((f.mean(0).abs() < 1).all()) and bool((f.std(0) > 0.3).all())
    with pytest.raises(ValueError, match="none of them shows a frame"):
        vqlora.calibrate_features(model, config, [{"input_ids": inputs["input_ids"]}])


# Odd batches


@pytest.mark.parametrize("name", ["kinevlm", "smolvlm", "qwen2_5_vl"])
def test_one_frame_black_frames_and_text_alone(name):
    model = stir(adapted(name))
    model(**batch(name, frames=1))
    inputs = batch(name)
    key = next(key for key in ("pixel_values_videos", "pixel_values") if key in inputs)
    inputs[key] = torch.zeros_like(inputs[key])
    assert bool(model(**inputs).logits.isfinite().all())
    ids = torch.arange(16, 24)[None]
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    twice = model(input_ids=ids.repeat(2, 1), attention_mask=torch.ones(2, 8, dtype=torch.long)).logits
    torch.testing.assert_close(alone[0], twice[1], rtol=0, atol=1e-5)
    assert next(iter(vqlora.gates(model).values())).shape[0] == 1


def test_rows_of_text_that_share_a_clip_get_its_frames():
    model, inputs = stir(adapted()), batch()
    wanted = model(**inputs).logits
    texts = {k: v for k, v in inputs.items() if k not in ("pixel_values", "frame_times")}
    shared = inputs | {k: v.repeat_interleave(2, 0) for k, v in texts.items()}
    torch.testing.assert_close(model(**shared).logits, wanted.repeat_interleave(2, 0), rtol=0, atol=1e-5)


def test_a_part_called_by_itself_needs_to_know_its_frames():
    model, inputs = stir(adapted()), batch()
    with pytest.raises(RuntimeError, match="outside the model's forward.*vqlora.watch"):
        model.video_tokens(inputs["pixel_values"], inputs["frame_times"])
    with vqlora.watch(model, **inputs):
        assert model.video_tokens(inputs["pixel_values"], inputs["frame_times"]).shape[0] == 2


# What can be read off


def test_gates_and_effective_ranks_of_the_last_forward():
    model, inputs = stir(adapted(ranks={"vision": 4, "text": 2}, modalities=("vision", "text"))), batch()
    model(**inputs)
    gates, ranks = vqlora.gates(model), vqlora.effective_ranks(model)
    assert list(gates) == target_modules(tiny_model("kinevlm"), ("vision", "text"))
    for name, g in gates.items():
        rank = 4 if "vision" in name else 2
        assert g.shape == (6, rank) and ranks[name].shape == (6,)
        assert bool((g > 0).all()) and bool((g < 2).all()) and bool((ranks[name] <= rank + 1e-5).all())


@pytest.mark.parametrize("gate", ["scalar", "rank", "mixture"])
def test_gates_are_at_most_a_fortieth_of_the_adapter_on_the_embedded_base(gate):
    with torch.device("meta"):
        model = KineVLMForConditionalGeneration(small_config(190))
        model = peft.get_peft_model(model, vqlora.VQLoraConfig(ranks=8, gate=gate, layers="attention+mlp"))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    share = sum(n for name, n in sizes.items() if is_gate(name)) / sum(sizes.values())
    assert 0 < share <= 0.025


def test_parameter_names_put_gates_below_their_layers():
    model = adapted()
    names = [plain_name(n) for n, p in model.named_parameters() if is_gate(n)]
    assert sum("lora_gate_trunk" in name and name.endswith("weight") for name in names) == 3  # one a modality
