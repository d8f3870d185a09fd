"""The compatibility table says what was tried: "yes" where it worked, the reason where it did not."""

import pytest
import torch

from vqlora.zoo import ZOO, compat, tiny_batch


def test_a_row_is_what_was_really_tried(monkeypatch):
    def faulty(model, batch):
        raise ValueError("a reason\nthat " + "goes on " * 20)

    monkeypatch.setattr(compat, "audit", faulty)
    table = compat.compatibility(["qwen2_5_vl"])
    assert list(table.index) == ["Qwen2_5_VLForConditionalGeneration"]
    row = table.iloc[0].to_dict()
    reason = row.pop("audit")
    assert reason.startswith("a reason that goes on") and len(reason) == 80
    assert row == dict.fromkeys(("forward", "backward", "NF4", "reload", "merge", "gates"), "yes")
    lines = compat.to_markdown(table).splitlines()
    assert lines[0] == "| class | forward | backward | NF4 | reload | merge | gates | audit |"
    assert lines[2].startswith("| `Qwen2_5_VLForConditionalGeneration` | yes | yes |")


def test_laws_that_do_not_hold_are_no_yes(monkeypatch):
    other = compat._adapted
    monkeypatch.setattr(
        compat, "_adapted", lambda name, bits, shaken=False, **o: other(name, bits, True, **o)
    )
    assert compat._cell(compat._forward, "smolvlm", None) == "differs from the base at the start"
    monkeypatch.setattr(compat, "gates", lambda model: {})
    assert compat._cell(compat._gates, "smolvlm") == "no layer has a gate"


def test_unknown_classes_are_named():
    with pytest.raises(KeyError, match="no class 'gpt'; known: kinevlm"):
        compat.compatibility(["gpt"])


@pytest.mark.parametrize("name", [name for name in ZOO if name != "xclip"])  # a dual encoder writes nothing
def test_adapted_4_bit_classes_generate_alike_with_and_without_a_cache(name):
    model = compat._adapted(name, "nf4", shaken=True)
    batch = tiny_batch(name, model.get_base_model())
    batch.pop("labels")
    config = model.get_base_model().config
    places = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted["suppress_tokens"] = [token for token in places if token is not None]
    with torch.no_grad():
        cached, anew = (model.generate(**batch, **wanted, use_cache=cache) for cache in (True, False))
        beams = model.generate(**batch, **wanted, num_beams=2)
    assert torch.equal(cached, anew) and beams.shape == cached.shape
