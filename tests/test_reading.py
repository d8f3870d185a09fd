"""Reading many choices together gives what reading each by itself gives, at less work."""
import numpy as np
import peft
import pytest
import torch
from little_adapters import stir
from little_models import lively

import vqlora
from vqlora import quantize, scoring
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip
from vqlora.selection.reading import frames_stand_alone, plain_layers, read_choices

CHOICES = [(0, (3, 9)), (0, (3, 12)), (1, (3, 9)), (0, (5,)), (1, (0, 4, 9, 15)), (0, (3, 9)),
           (0, (1, 4, 9, 15))]
CAPTIONS = ("the cat moves left then the dog spins", "cat left")


def footage(count=2, frames=16):
    rng = np.random.default_rng(0)
    films = [rng.integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8) for _ in range(count)]
    clips = [Clip(f"clip-{n}", None, "test", {"en": CAPTIONS}) for n in range(count)]
    return clips, ArrayStore(clips, films)


def model_of(bits="nf4", adapter="lora", compute="fp32"):
    torch.manual_seed(0)  # what peft draws
    model, tokenizer = lively()
    model = quantize.load_quantized(model, bits, compute_dtype=compute)
    if adapter == "lora":
        ends = ("q_proj", "fc1", "linear_1", "down_proj")
        layers = [name for name, _ in model.named_modules() if name.endswith(ends)]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers))
    elif adapter == "gated":
        model = peft.get_peft_model(model, vqlora.VQLoraConfig(ranks=4, gate="rank"))
    return stir(model), tokenizer


def read(model, tokenizer, references=None, choices=CHOICES, **how):
    clips, store = footage()
    references = references or {clip.id: CAPTIONS for clip in clips}
    with scoring.scoring_mode(model):
        return read_choices(model, tokenizer, clips, store, choices, references, **how)


def assert_alike(one, other, tolerance=1e-5):
    assert list(one) == list(other) and one
    for choice, told in one.items():
        assert told.caption == other[choice].caption
        for a, b in zip(told.references, other[choice].references, strict=True):
            assert a.tokens == b.tokens
            assert a.logp / a.tokens == pytest.approx(b.logp / b.tokens, abs=tolerance)


@pytest.mark.parametrize("bits, adapter", [("nf4", "lora"), ("nf4", None), ("bf16", "lora")])
def test_reading_together_gives_what_reading_alone_gives(bits, adapter):
    model, tokenizer = model_of(bits, adapter)
    together, alone = read(model, tokenizer), read(model, tokenizer, shared=False, batch_size=1)
    assert_alike(together, alone)
    assert len(set(told.caption for told in alone.values())) > 1  # the choices matter
    assert len(together) == len(set(CHOICES))


def test_each_frame_goes_through_the_tower_once():
    model, tokenizer = model_of()
    rows, tower = [], scoring.below(model).model.vision_tower
    tower.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    read(model, tokenizer)
    assert sum(rows) == len({(owner, frame) for owner, frames in CHOICES for frame in frames})


def test_a_reference_that_is_all_first_choices_is_the_caption():
    model, tokenizer = model_of()
    alone = read(model, tokenizer, shared=False)
    choice, told = next((choice, told) for choice, told in alone.items()
                        if len(told.caption.split()) < 48 and "<" not in told.caption)  # it ended
    references = {"clip-0": ("cat", told.caption, "dog"), "clip-1": ("cat", told.caption)}
    found = read(model, tokenizer, references)
    score = found[choice].references[1]
    assert score.hits == score.tokens and found[choice].caption == told.caption
    assert_alike(found, read(model, tokenizer, references, shared=False))


def test_layers_are_plain_inside_and_their_own_again_outside():
    model, _ = model_of()
    x, before = torch.randn(3, 64), dict(model.named_modules())
    layer = scoring.below(model).model.vision_tower.layers[0].self_attn
    wanted = layer.q_proj(x), layer.k_proj(x)
    with pytest.raises(RuntimeError, match="stop"), plain_layers(model):
        assert type(layer.q_proj) is type(layer.k_proj) is torch.nn.Linear
        torch.testing.assert_close(layer.q_proj(x), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.k_proj(x), wanted[1], rtol=1e-5, atol=1e-5)
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == before
    model.disable_adapter_layers()
    with plain_layers(model):  # switched off, they add nothing
        assert not torch.allclose(layer.q_proj(x), wanted[0], atol=1e-2)


def test_what_cannot_be_shared_is_read_choice_by_choice():
    gated, tokenizer = model_of(adapter="gated")
    assert not frames_stand_alone(gated) and frames_stand_alone(model_of()[0])
    assert_alike(read(gated, tokenizer), read(gated, tokenizer, shared=False))
    rounded, tokenizer = model_of(compute="bf16")
    with plain_layers(rounded):  # 16-bit arithmetic rounds between the parts of a sum: they stay apart
        assert not any(type(m) is torch.nn.Linear and m.weight.dtype == torch.float32
                       and "lora" not in n for n, m in rounded.named_modules())
