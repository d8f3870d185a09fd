"""The compatibility table says what was tried: "yes" where it worked, the reason where it did not."""

import pytest

from vqlora.zoo import compat


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
