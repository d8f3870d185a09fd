"""The law of the row map: a frame that changes, changes its own rows only, before the first mixing layer."""

import pytest
import torch
from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

from vqlora.modalities import describe, linear_layers, target_modules
from vqlora.modalities.rows import FrameRows, frame_pixels, frame_rows, keep_black_frames
from vqlora.zoo import IMAGE, VIDEO, ZOO, tiny_batch, tiny_model

UNEVEN = [name for name, tiny in ZOO.items() if not tiny.even]
PADDED = ("smolvlm", "idefics2", "idefics3")


def pixels_key(batch):
    return next(key for key in ("pixel_values_videos", "pixel_values") if batch.get(key) is not None)


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


def with_frame_changed(model, batch, frame):
    """The batch with other pixels in one frame, in the order of `frame_pixels`."""
    key = pixels_key(batch)
    pixels = batch[key].clone().requires_grad_()
    frame_pixels(model, {**batch, key: pixels})[frame].sum().backward()
    return {**batch, key: torch.where(pixels.grad != 0, 0.1 - batch[key], batch[key])}


def parts_that_show(model, batch, frame, mixed):
    """Parts in which a change of `frame` shows, after checking that it shows in its own rows only.

    Second value: layers called mixing that did change rows of other frames.
    """
    known, rows, parts, mixing = describe(model), frame_rows(model, batch), set(), set()
    before, after = watched(model, batch), watched(model, with_frame_changed(model, batch, frame))
    assert before.keys() == after.keys()
    for layer, calls in before.items():
        for (shape, old), (_, new) in zip(calls, after[layer], strict=True):
            index = rows.index(known.layout(layer), shape).expand(shape[:-1])
            touched = set(index[(old != new).any(-1)].tolist())
            if mixed(layer):
                mixing.update([layer] if touched - {frame} else [])
            else:
                assert touched <= {frame}, layer
                parts.update([known.of(layer)] if touched else [])
    return parts, mixing


@pytest.mark.parametrize("name", ZOO)
def test_a_frame_changes_its_own_rows_only(name):
    model = tiny_model(name)
    batch, known = tiny_batch(name, model), describe(model)
    assert frame_rows(model, batch).clip.tolist() == [0, 0, 0, 1, 1, 1]
    for frame in (1, 5):
        parts, mixing = parts_that_show(model, batch, frame, known.mixed)
        # idefics has no frame in its text; the two others mix before a part shows anything: see below
        shown = {"kinevlm": {"vision"}, "idefics": {"vision", "fusion"}, "xclip": set()}
        assert parts == shown.get(name, {"vision", "fusion", "text"})
        assert mixing


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("frames", [(1, 3), (0, 2)])
def test_clips_of_unequal_length(name, frames):
    model = tiny_model(name)
    batch, known = tiny_batch(name, model, frames=frames), describe(model)
    rows = frame_rows(model, batch)
    assert rows.clips == 2 and torch.bincount(rows.clip, minlength=2).tolist() == list(frames)
    parts, _ = parts_that_show(model, batch, 1, known.mixed)
    assert parts == {"vision", "fusion", "text"}


def test_clips_of_unequal_size():
    model = tiny_model("video_llama_3")
    batch = tiny_batch("video_llama_3", model, frames=(2, 1))
    # the second clip: one frame of 4 x 8 patches, each its own token, of which the last three are dropped
    batch["pixel_values_videos"] = torch.randn(2 * 16 + 32, 192)
    batch["video_grid_thw"] = torch.tensor([[2, 4, 4], [1, 4, 8]])
    batch["video_merge_sizes"] = torch.tensor([2, 1])
    batch["video_compression_mask"] = torch.arange(2 * 4 + 32) < 37
    words = torch.full((2, 32), 20)
    words[0, 2:6], words[0, 8:12], words[1, 1:30] = VIDEO, VIDEO, VIDEO
    batch = {**batch, "input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}
    rows = frame_rows(model, batch)
    assert rows.clip.tolist() == [0, 0, 1]
    assert [stage.tolist() for stage in rows.lengths] == [[16, 16, 32], [4, 4, 32]]
    for frame in range(3):
        parts, _ = parts_that_show(model, batch, frame, describe(model).mixed)
        assert parts == {"vision", "fusion", "text"}


def test_an_encoder_decoder():
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = tiny_model("instructblipvideo").config.to_dict()
    config["text_config"] = {"model_type": "t5", **sizes, "decoder_start_token_id": 0, "pad_token_id": 0}
    model = InstructBlipVideoForConditionalGeneration(InstructBlipVideoConfig(**config)).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param.data, std=0.1)
    batch, known = tiny_batch("instructblipvideo", model), describe(model)
    parts, mixing = parts_that_show(model, batch, 4, known.mixed)
    assert parts == {"vision", "fusion", "text"}
    assert "language_model.decoder.block.0.layer.1.EncDecAttention.k" in mixing
    assert known.layout("language_model.decoder.block.0.layer.1.EncDecAttention.k") == "tokens"
    assert len(target_modules(model, ("text",), "attention")) == 3 * 4


def test_rows_stay_true_behind_a_mixing_that_is_switched_off():
    model = tiny_model("xclip")
    for name, module in linear_layers(model):
        if name.startswith("vision_model") and name.endswith("message_attn.out_proj"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    parts, _ = parts_that_show(
        model, tiny_batch("xclip", model), 4, lambda name: name.startswith(("mit", "prompts"))
    )
    assert parts == {"vision", "fusion"}
    model = tiny_model("kinevlm")
    first = model.model.multi_modal_projector.linear_1
    first.weight.data[:, first.in_features // 2 :] = 0  # the change since the last frame
    first_projection = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    parts, _ = parts_that_show(
        model,
        tiny_batch("kinevlm", model),
        4,
        lambda name: name.startswith("model.language_model") and not name.endswith(first_projection),
    )
    assert parts == {"vision", "fusion", "text"}


@pytest.mark.parametrize("name", ZOO)
def test_frame_pixels_do_not_depend_on_the_rest_of_the_batch(name):
    model = tiny_model(name)
    batch = tiny_batch(name, model)
    pixels, rows = frame_pixels(model, batch), frame_rows(model, batch)
    assert pixels.shape[:2] == (rows.frames, 3) and pixels.dtype == torch.float32
    other = frame_pixels(model, with_frame_changed(model, batch, 2))
    changed = (pixels != other).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]


def test_patches_are_put_together_as_they_were_cut():
    model = tiny_model("qwen2_5_vl")
    batch = tiny_batch("qwen2_5_vl", model, clips=1, frames=1)
    # as the processor cuts: blocks of 2 x 2 patches lie together, each holds colour, time, rows, columns
    image = torch.randn(2, 3, 32, 32)
    cut = image.reshape(1, 2, 3, 2, 2, 8, 2, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(16, -1)
    whole = frame_pixels(model, {**batch, "pixel_values_videos": cut})
    assert torch.equal(whole[0, :, ::2, ::2], image.mean(0))


@pytest.mark.parametrize("name", PADDED)
def test_a_black_frame_is_kept_and_padding_is_not(name):
    model = tiny_model(name)
    batch = tiny_batch(name, model, frames=(2, 3))
    batch["pixel_values"][1, 1] = 0
    with pytest.raises(ValueError), torch.no_grad():
        model(**batch)
    rows, kept = frame_rows(model, batch), keep_black_frames(model, batch)
    assert rows.clip.tolist() == [0, 0, 1, 1, 1]
    with torch.no_grad():
        model(**kept)
    assert not batch["pixel_values"][1, 1].any() and kept["pixel_values"][1, 1].abs().sum() < 1e-4
    assert not kept["pixel_values"][0, 2].any()
    assert len(frame_pixels(model, kept)) == len(frame_pixels(model, batch)) == 5
    parts, _ = parts_that_show(model, kept, 4, describe(model).mixed)
    assert parts == {"vision", "fusion", "text"}
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    assert keep_black_frames(model, half)["pixel_values"][1, 1].any()


@pytest.mark.parametrize("name", ZOO)
def test_text_alone_has_no_frames(name):
    model = tiny_model(name)
    words = torch.randint(16, 60, (2, 5))
    assert frame_rows(model, {"input_ids": words, "pixel_values": None}) is None
    assert keep_black_frames(model, {"input_ids": words}) == {"input_ids": words}


@pytest.mark.parametrize("name", PADDED)
def test_an_all_zero_image_beside_text_alone(name):
    model = tiny_model(name)
    words, pixels = torch.randint(16, 60, (2, 5)), torch.zeros(2, 1, 3, 32, 32)
    rows = frame_rows(model, {"input_ids": words, "pixel_values": pixels})
    assert torch.equal(rows.tokens, torch.tensor([[1], [2]]).expand(2, 5))


def test_several_videos_in_one_row_and_none_in_another():
    model = tiny_model("llava_onevision")
    batch = tiny_batch("llava_onevision", model, clips=3, frames=2)
    video = batch["input_ids"][0, 1:-4]
    words = torch.full((4,), 20)
    long = torch.cat([words, video, words, video])
    ids = torch.stack([long, torch.cat([torch.full((len(long) - len(video),), 20), video]), long * 0 + 20])
    rows = frame_rows(model, {**batch, "input_ids": ids})
    assert rows.clip.tolist() == [0, 0, 0, 0, 1, 1] and rows.clips == 3
    assert rows.tokens[0].tolist() == [6] * 4 + [0] * 4 + [1] * 4 + [6] * 5 + [2] * 4 + [3] * 4 + [6]
    assert rows.tokens[1, -9:].tolist() == [4] * 4 + [5] * 4 + [7]
    assert rows.tokens[2].unique().tolist() == [8]


def test_rows_of_text_that_share_a_clip():
    model = tiny_model("kinevlm")
    batch = tiny_batch("kinevlm", model, clips=4, frames=2)
    batch["pixel_values"] = batch["pixel_values"][:2]
    rows = frame_rows(model, batch)
    assert rows.clip.tolist() == [0, 0, 1, 1] and rows.clips == 2
    assert torch.equal(rows.tokens[0], rows.tokens[1])
    assert rows.tokens[:, -1].tolist() == [4, 4, 5, 5] and rows.tokens[2, 1] == 2


@pytest.mark.parametrize("name", [name for name in ZOO if name != "xclip"])  # it has no decoder
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_fit_every_call_of_generate(name, beams):
    model = tiny_model(name)
    batch, known = tiny_batch(name, model), describe(model)
    del batch["labels"]
    rows, steps = [frame_rows(model, batch)], []
    prompt = batch["input_ids"].shape[1]

    def begin(module, args, kwargs):
        found = frame_rows(model, kwargs)  # some classes encode in the first forward, some before it
        rows.extend([found] if found is not None else [])

    def check(layer):
        def hook(module, args):
            x = args[0]
            index = rows[-1].index(known.layout(layer), x.shape).expand(x.shape[:-1])
            if known.of(layer) == "text" and x.shape[1] != prompt:
                assert x.shape[1] == 1 and bool((index >= rows[-1].frames).all())
                owner = (index[:, 0] - rows[-1].frames) % rows[-1].clips
                steps.append(owner.tolist())

        return hook

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer, module in linear_layers(model):
        if known.of(layer) and layer not in known.heads:
            module.register_forward_pre_hook(check(layer))
    model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=beams)
    assert steps and all(step == sorted(step) and len(step) == 2 * beams for step in steps)


@pytest.fixture(scope="module")
def two_clips():
    """Two clips of two frames; tokens: a word, two for each frame, a word."""
    tokens = torch.tensor([[4, 0, 0, 1, 1, 4], [5, 2, 2, 3, 3, 5]])
    lengths = (torch.tensor([8, 8, 4, 4]), torch.tensor([2, 2, 1, 1]))
    sound = (torch.tensor([3, 1]),)
    return FrameRows(torch.tensor([0, 0, 1, 1]), 2, tokens, None, lengths, sound)


@pytest.mark.parametrize(
    "layout, shape, wanted",
    [
        ("frames", (4, 9, 8), [[0], [1], [2], [3]]),
        ("frames", (4, 8), [0, 1, 2, 3]),
        ("flat", (6, 8), [0, 0, 1, 1, 2, 3]),
        ("flat", (24, 8), [0] * 8 + [1] * 8 + [2] * 4 + [3] * 4),
        ("tokens", (2, 6, 8), [[4, 0, 0, 1, 1, 4], [5, 2, 2, 3, 3, 5]]),
        ("tokens", (2, 1, 8), [[4], [5]]),  # cached generation
        ("tokens", (4, 1, 8), [[4], [4], [5], [5]]),  # two beams each
        ("cross", (2, 4, 8), [[0, 0, 1, 1], [2, 2, 3, 3]]),
        ("cross", (4, 2, 8), [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ("cross", (2, 2, 5, 8), [[[0], [1]], [[2], [3]]]),
        ("text", (2, 7, 8), [[4], [5]]),
        ("clips", (2, 7, 8), [[4], [5]]),
        ("sound", (4, 8), [4, 4, 4, 5]),
        ("sound", (8, 8), [4] * 6 + [5] * 2),  # two beams each
    ],
)
def test_index_of_each_layout(two_clips, layout, shape, wanted):
    assert two_clips.index(layout, torch.Size(shape)).tolist() == wanted


def test_beams_in_the_prompt(two_clips):
    index = two_clips.index("tokens", torch.Size((4, 6, 8)))
    assert torch.equal(index, two_clips.tokens[[0, 0, 1, 1]])


@pytest.mark.parametrize(
    "layout, shape",
    [
        ("frames", (5, 9, 8)),
        ("flat", (7, 8)),
        ("tokens", (3, 6, 8)),
        ("tokens", (2, 7, 8)),
        ("cross", (2, 3, 8)),
        ("text", (3, 7, 8)),
        ("clips", (4, 7, 8)),
        ("sound", (5, 8)),
    ],
)
def test_rows_that_do_not_fit_are_refused(two_clips, layout, shape):
    with pytest.raises(ValueError, match=rf"'{layout}'.*\({shape[0]}, .*4 frames in 2 clips: expected"):
        two_clips.index(layout, torch.Size(shape))


def test_unknown_layout(two_clips):
    with pytest.raises(ValueError, match="'rows' is not known; allowed: frames, flat"):
        two_clips.index("rows", torch.Size((4, 8)))


def test_inputs_that_do_not_fit_are_refused():
    onevision, smol = tiny_model("llava_onevision"), tiny_model("smolvlm")
    batch = tiny_batch("llava_onevision", onevision)
    with pytest.raises(ValueError, match=r"\[13, 13\] placeholders .video_token_id.* 2 clips of 5 frames"):
        frame_rows(onevision, {**batch, "pixel_values_videos": torch.zeros(2, 5, 3, 32, 32)})
    with pytest.raises(ValueError, match="images beside videos"):
        frame_rows(onevision, {**batch, "pixel_values": batch["pixel_values_videos"]})
    with pytest.raises(ValueError, match="input_ids are needed"):
        frame_rows(onevision, {"pixel_values_videos": batch["pixel_values_videos"]})
    batch = tiny_batch("smolvlm", smol)
    batch["input_ids"][0, 2:6] = IMAGE + 20
    with pytest.raises(ValueError, match=r"\[8, 12\] placeholders per row, 4 to a frame.* \[3, 3\] images"):
        frame_rows(smol, batch)
