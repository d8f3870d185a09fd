import pytest
import torch
from settings_like import tiny_smolvlm
from torch import nn

import vqlora.modalities.architectures  # noqa: F401  fills the table before a test puts a copy in its place
from vqlora import modalities
from vqlora.base import tiny
from vqlora.modalities import describe, linear_layers, match_names, register_modalities, target_modules
from vqlora.modalities.rows import frame_pixels, frame_rows
from vqlora.modalities.sources import Clips
from vqlora.zoo import tiny_model


@pytest.fixture(scope="module")
def kine():
    return tiny()[0]


def test_every_part_has_its_own_layers_and_nothing_else(kine):
    for modality, start in (
        ("vision", "model.vision_tower."),
        ("fusion", "model.multi_modal_projector."),
        ("text", "model.language_model."),
    ):
        names = target_modules(kine, (modality,))
        assert names and all(name.startswith(start) for name in names)
        assert all(type(kine.get_submodule(name)) is nn.Linear for name in names)
    whole = target_modules(kine)
    assert len(whole) == len(set(whole)) == 2 * 6 + 2 + 2 * 7  # without heads and the projector's clock
    assert not any("head" in name or name.endswith(".time") for name in whole)


def test_attention_only(kine):
    names = target_modules(kine, ("vision", "text"), "attention")
    assert len(names) == 2 * 4 + 2 * 4 and all("self_attn" in name for name in names)
    with pytest.raises(ValueError, match="no layer of fusion .*linear_1"):
        target_modules(kine, ("fusion", "text"), "attention")


def test_patterns_choose_inside_the_named_part_only(kine):
    assert target_modules(kine, ("text",), "*.q_proj") == [
        f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    assert len(target_modules(kine, ("text",), ("*.q_proj", "model.language_model.layers.1.mlp"))) == 2 + 3
    with pytest.raises(
        ValueError, match=r"'q_proj' matches no layer.*did you mean 'model\.language_model\.layers"
    ):
        target_modules(kine, ("text",), "q_proj")
    with pytest.raises(ValueError, match="'model.vision_tower' matches no layer"):
        target_modules(kine, ("text",), "model.vision_tower")


def test_smolvlm():
    smol = tiny_smolvlm()
    names = target_modules(smol)
    assert {describe(smol).of(name) for name in names} == {"vision", "fusion", "text"}
    assert describe(smol).of("lm_head") is None
    assert target_modules(smol, ("fusion",)) == ["model.connector.modality_projection.proj"]


def test_modality_of_a_wrapped_name(kine):
    known = describe(kine)
    assert known.of("base_model.model.model.vision_tower.layers.0.mlp.fc1.base_layer") == "vision"
    assert known.of("model.vision_tower_of_babel.fc1") is None


def test_unknown_architecture_shows_how_to_describe_it(monkeypatch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes, self.bridge, self.talk = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    monkeypatch.setattr(modalities, "_KNOWN", dict(modalities._KNOWN))
    with pytest.raises(KeyError, match="'Other' has no description.*register_modalities.*eyes, bridge, talk"):
        target_modules(Other())
    register_modalities("Other", vision=("eyes",), fusion=("bridge",), text=("talk",), heads=())
    assert target_modules(Other(), ("vision", "text")) == ["eyes", "talk"]
    with pytest.raises(ValueError, match="'audio' is not a part of Other; allowed: vision, fusion, text"):
        target_modules(Other(), ("audio",))
    with pytest.raises(KeyError, match="does not say where the frames are.*rows=.*Clips"):
        frame_rows(Other(), {})
    with pytest.raises(ValueError, match="'rows' of 'eyes' is not known; allowed: frames .*; flat"):
        register_modalities("Other", vision=("eyes",), layouts={"eyes": "rows"})
    with pytest.raises(ValueError, match="vision 'a.b' lies inside text 'a'"):
        register_modalities("Nested", vision=("a.b",), text=("a",))
    with pytest.raises(ValueError, match="no part given"):
        register_modalities("Empty")


class Config:
    model_type, image_token_id = "home_made", 5


class HomeMade(nn.Module):
    """A tower over frames, a bridge over the frames of a clip side by side, and a decoder that adds up."""

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.eyes, self.bridge, self.talk = nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.words = nn.Embedding(9, 4)

    def forward(self, input_ids, pixel_values):
        seen = self.eyes(pixel_values.flatten(0, 1).flatten(1))
        seen = self.bridge(seen.unflatten(0, pixel_values.shape[:2]))
        text = self.words(input_ids).masked_scatter((input_ids == 5)[..., None], seen)
        return self.talk(text).cumsum(dim=1)


def test_a_described_architecture_has_its_rows(monkeypatch):
    monkeypatch.setattr(modalities, "_KNOWN", dict(modalities._KNOWN))
    register_modalities(
        "home_made",
        vision=("eyes",),
        fusion=("bridge",),
        text=("talk",),
        layouts={"bridge": "cross"},
        rows=Clips("pixel_values", "image_token_id"),
    )
    model, pixels = HomeMade(), torch.randn(2, 3, 3, 2, 2)
    inputs = {"input_ids": torch.tensor([[1, 5, 5, 5], [5, 5, 5, 2]]), "pixel_values": pixels}
    rows, known, seen = frame_rows(model, inputs), describe(model), {}
    assert [known.layout(name) for name in ("eyes", "bridge", "talk")] == ["frames", "cross", "tokens"]
    for name, module in linear_layers(model):
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append((args[0].shape, out))
        )
    model(**inputs)
    pixels[1, 0] += 1  # frame 3
    model(**inputs)
    for name, ((shape, before), (_, after)) in seen.items():
        index = rows.index(known.layout(name), shape).expand(shape[:-1])
        assert index[(before != after).any(-1)].unique().tolist() == [3]
    assert frame_pixels(model, inputs).shape == (6, 3, 2, 2)
    with pytest.raises(ValueError, match="'words' lies in no part of home_made"):
        known.layout("words")


def test_the_longest_path_decides_the_layout():
    known = modalities.Modalities("x", text=("a",), layouts={"a": "text", "a.*.cross.[kv]": "cross"})
    assert [known.layout(n) for n in ("a.0.cross.k", "a.0.cross.q", "base_model.model.a.1.cross.v")] == [
        "cross",
        "text",
        "cross",
    ]


def test_layers_above_the_one_that_llava_reads_never_learn():
    model = tiny_model("llava_next_video")  # reads the last but one
    names = target_modules(model, ("vision",))
    assert names and all(".layers.0." in name for name in names)
    assert "vision_feature_layer" in describe(model).why_never(names[0].replace("layers.0", "layers.1"))
    assert describe(model).why_never(names[0]) is None
    model.config.vision_feature_layer = [0, -1]
    assert any(".layers.1." in name for name in target_modules(model, ("vision",)))


def test_match_names_respects_module_boundaries():
    names = ["layer.1.fc", "layer.11.fc", "head"]
    assert match_names(names, ("layer.1",), "skip") == ["layer.1.fc"]
    assert match_names(names, ("layer.*",), "skip") == names[:2]
    assert match_names(names, (), "skip") == []
