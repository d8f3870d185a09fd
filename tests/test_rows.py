"""The law of the row map: a frame that changes, changes its own rows only, before the first mixing layer."""

import pytest
import torch

from vqlora.modalities import describe, linear_layers
from vqlora.rows import frame_pixels, frame_rows
from vqlora.zoo import ZOO, tiny_batch, tiny_model

PIXELS = ("pixel_values_videos", "pixel_values")


def watched(model, batch):
    """name -> [(input shape, output)] of every linear layer in a part of the model, call by call."""
    known, seen = describe(model), {}

    def watch(name):
        return lambda module, args, out: seen.setdefault(name, []).append((args[0].shape, out.detach()))

    hooks = [m.register_forward_hook(watch(n)) for n, m in linear_layers(model) if known.of(n)]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def frame_changed(name, model, batch, frame):
    """The batch with other pixels in one frame (in row order), found by `frame_pixels` alone."""
    key = next(k for k in PIXELS if batch.get(k) is not None)
    pixels = batch[key].clone().requires_grad_()
    frame_pixels(model, {**batch, key: pixels})[frame].sum().backward()
    return {**batch, key: torch.where(pixels.grad != 0, -batch[key] + 0.1, batch[key])}


@pytest.mark.parametrize("name", ZOO)
def test_a_frame_changes_its_own_rows_only(name):
    model = tiny_model(name)
    batch = tiny_batch(name, model)
    known, rows = describe(model), frame_rows(model, batch)
    assert rows.frames == 6 and rows.clip.tolist() == [0, 0, 0, 1, 1, 1]
    before, parts, mixing = watched(model, batch), set(), set()
    for frame in (1, 5):
        after = watched(model, frame_changed(name, model, batch, frame))
        assert after.keys() == before.keys()
        for layer, calls in before.items():
            for (shape, old), (_, new) in zip(calls, after[layer], strict=True):
                index = rows.index(known.layout(layer), shape).expand(shape[:-1])
                touched = index[(old != new).any(-1)]
                if known.mixed(layer):
                    mixing.update([layer] if bool((touched != frame).any()) else [])
                else:
                    assert set(touched.tolist()) <= {frame}, layer
                    if bool((index == frame).any()):
                        assert bool((touched == frame).any()), layer
                        parts.add(known.of(layer))
    assert parts >= {m for m in ("vision",) if getattr(known, m)}, "no layer shows single frames"
    assert bool(mixing) == any(known.mixed(layer) for layer in before), "what is called mixing does not mix"
