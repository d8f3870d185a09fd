import pytest
from settings_like import tiny_smolvlm
from torch import nn

from vqlora import modalities
from vqlora.base import tiny
from vqlora.modalities import describe, match_names, register_modalities, target_modules


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
    with pytest.raises(ValueError, match="vision 'a.b' lies inside text 'a'"):
        register_modalities("Nested", vision=("a.b",), text=("a",))
    with pytest.raises(ValueError, match="no part given"):
        register_modalities("Empty")


def test_match_names_respects_module_boundaries():
    names = ["layer.1.fc", "layer.11.fc", "head"]
    assert match_names(names, ("layer.1",), "skip") == ["layer.1.fc"]
    assert match_names(names, ("layer.*",), "skip") == names[:2]
    assert match_names(names, (), "skip") == []
