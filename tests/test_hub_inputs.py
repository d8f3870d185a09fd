"""What a checkpoint of the hub is given: pixels and text as of its own processor, labels on answers."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

from vqlora.data.batches import Item
from vqlora.data.clips import Clip, Question
from vqlora.hub import is_hub
from vqlora.hub.batches import HubCollator
from vqlora.hub.checkpoint import NESTED, read_checkpoint, read_numbers
from vqlora.hub.families import FAMILIES, Shown, in_words
from vqlora.hub.pixels import frame_pixels
from vqlora.zoo.checkpoints import CHECKPOINTS, tiny_checkpoint

SECONDS = (0.0, 0.6, 1.3, 61.9)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name):
        if name not in made:
            made[name] = read_checkpoint(str(tiny_checkpoint(name, folder / name)))
        return made[name]

    return get


def item(number=0, frames=4, height=48, width=64, questions=()):
    rng = np.random.default_rng(number)
    clip = Clip(
        f"c{number}", Path("x"), "train", {"en": (f"a {'very ' * number}fast dog",)}, tuple(questions)
    )
    shown = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Item(clip, shown, np.linspace(0, 1, frames).astype(np.float32), number, 0)


def collator(checkpoint, **how):
    return HubCollator(checkpoint, {f"c{n}": (62.4, 61.9) for n in range(4)}, **how)


def ours(name, frames, numbers):
    return frame_pixels(frames, numbers, FAMILIES[name].sizes(numbers, *frames.shape[:3]))


PLAIN = {"resample": 3, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
PATCHES = {**PLAIN, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


@pytest.mark.parametrize(
    "name, stock, numbers, more",
    [
        (
            "smolvlm",
            SmolVLMImageProcessorPil,
            {**PLAIN, "resample": 1, "size": {"longest_edge": 100}, "max_image_size": {"longest_edge": 42}},
            {"do_image_splitting": False},
        ),
        (
            "idefics3",
            Idefics3ImageProcessorPil,
            {**PLAIN, "resample": 1, "size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 42}},
            {"do_image_splitting": False},
        ),
        (
            "idefics2",
            Idefics2ImageProcessorPil,
            {**PLAIN, "size": {"shortest_edge": 40, "longest_edge": 60}},
            {},
        ),
        (
            "internvl",
            GotOcr2ImageProcessorPil,
            {**PLAIN, "size": {"height": 56, "width": 56}},
            {"crop_to_patches": False},
        ),
        (
            "llava_next_video",
            CLIPImageProcessorPil,
            {
                **PLAIN,
                "size": {"shortest_edge": 36},
                "do_center_crop": True,
                "crop_size": {"height": 28, "width": 28},
            },
            {},
        ),
        (
            "llava_onevision",
            LlavaOnevisionImageProcessorPil,
            {**PLAIN, "size": {"height": 40, "width": 40}},
            {"image_grid_pinpoints": [[40, 40]]},
        ),
    ],
)
@pytest.mark.parametrize("shape", [(48, 64), (70, 30), (36, 36)])
def test_pixels_are_those_of_the_processors_that_run_without_torchvision(name, stock, numbers, more, shape):
    frames = item(1, 2, *shape).frames
    wanted = stock(**numbers, **more)(list(frames), return_tensors="np")["pixel_values"]
    wanted = wanted[:, 0] if name == "llava_onevision" else wanted[0] if wanted.ndim == 5 else wanted
    found = ours(name, frames, numbers)
    assert found.shape == wanted.shape and np.array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("shape", [(48, 64), (150, 90), (400, 300)])
def test_patches_are_those_of_the_processors_that_run_without_torchvision(shape):
    frames = np.repeat(item(1, 1, *shape).frames, 2, axis=0)  # an image is a step of two equal frames
    numbers = {**PATCHES, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    stock = Qwen2VLImageProcessorPil(**numbers)([frames[0]], return_tensors="pt")
    clip = ours("qwen2_5_vl", frames, numbers)
    found = FAMILIES["qwen2_5_vl"].lay([clip], numbers, [3.0])
    assert torch.equal(found["pixel_values_videos"], stock["pixel_values"])
    assert torch.equal(found["video_grid_thw"], stock["image_grid_thw"])
    assert found["second_per_grid_ts"].tolist() == [3.0]
    single = {**numbers, "temporal_patch_size": 1}
    stock = VideoLlama3ImageProcessorPil(**single)([frames[0]], return_tensors="pt")
    found = FAMILIES["video_llama_3"].lay([ours("video_llama_3", frames[:1], single)], single, [3.0])
    assert torch.equal(found["pixel_values_videos"], stock["pixel_values"])
    assert torch.equal(found["video_grid_thw"], stock["image_grid_thw"])


def test_a_budget_of_pixels_is_shared_among_frames():
    frames = item(1, 8, 200, 200).frames
    numbers = {**PATCHES, "size": {"shortest_edge": 1, "longest_edge": 8 * 56 * 56}}
    assert (
        ours("qwen3_vl", frames, numbers).shape
        == ours("video_llama_3", frames, numbers).shape
        == (8, 3, 56, 56)
    )
    assert ours("qwen3_vl", frames[:2], numbers).shape == (2, 3, 112, 112)


@pytest.mark.parametrize(
    "name, image, whole",
    [
        ("idefics3", Idefics3ImageProcessorPil, Idefics3Processor),
        ("idefics2", Idefics2ImageProcessorPil, Idefics2Processor),
    ],
)
def test_rows_are_those_of_the_processors_that_run_whole(checkpoints, name, image, whole):
    checkpoint = checkpoints(name)
    numbers = {**checkpoint.numbers, "do_image_splitting": False}
    batch = collator(checkpoint)([item(0), item(1)])
    processor = whole(
        image(**numbers),
        AutoTokenizer.from_pretrained(checkpoint.source),
        image_seq_len=4,
        chat_template=checkpoint.template,
    )
    for row in range(2):
        request = [*[{"type": "image"}] * 4, {"type": "text", "text": "Describe the video."}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True
        )
        stock = processor(
            images=[list(map(Image.fromarray, item(row).frames))],
            text=[text],
            add_special_tokens=False,
            return_tensors="pt",
        )
        assert torch.equal(batch["pixel_values"][row], stock["pixel_values"][0])
        assert torch.equal(batch["pixel_attention_mask"][row], stock["pixel_attention_mask"][0])
        given = batch["labels"][row].ne(-100).int().argmax()
        assert torch.equal(batch["input_ids"][row, :given], stock["input_ids"][0])


def stock_text(name, shown, monkeypatch):
    """What the class's processor writes for a clip: its method, on a stand-in with what that reads."""
    metadata = SimpleNamespace(
        fps=10,
        timestamps=list(shown.seconds),
        duration=shown.duration_s,
        frames_indices=[round(10 * second) for second in shown.seconds],
    )
    side = 8 * 2 * shown.tokens
    grid = torch.tensor([[shown.steps, 2, 2 * shown.tokens]])
    inputs = {
        "video_metadata": [metadata],
        "video_grid_thw": grid,
        "video_merge_sizes": [2],
        "pixel_values": np.zeros((1, 4, 3, 8, 8)),
        "pixel_values_videos": np.zeros((1, 4, 3, 16, side)),
        "video_compression_mask": torch.ones(shown.steps * shown.tokens, dtype=torch.long),
    }
    tokens = {
        "image_token": shown.token,
        "video_token": shown.token,
        "fake_image_token": "<fake>",
        "global_image_token": "<global>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "vision_start_token": "<vs>",
        "vision_end_token": "<ve>",
    }
    numbers = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    stand_in = SimpleNamespace(
        **tokens,
        video_processor=numbers,
        image_seq_len=shown.tokens,
        patch_size=8,
        image_seq_length=shown.tokens,
        num_image_tokens=(2 * 2) ** 2,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="full",
        _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a),
    )
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words)
    return STOCK[name].replace_video_token(stand_in, inputs, 0)


STOCK = {
    "smolvlm": processing_smolvlm.SmolVLMProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "llava_next_video": LlavaNextVideoProcessor,
    "video_llava": VideoLlavaProcessor,
    "internvl": InternVLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "video_llama_3": VideoLlama3Processor,
}


@pytest.mark.parametrize("name", STOCK)
def test_a_clips_text_is_the_one_its_processor_writes(name, monkeypatch):
    tokens = {"llava_onevision": 4, "video_llava": 2 * 8 + 1, "llava_next_video": 2}.get(name, 4)
    steps = 2 if FAMILIES[name].joined else 4
    words = {
        "fake_image_token": "<fake>",
        "global_image_token": "<global>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "vision_start_token": "<vs>",
        "vision_end_token": "<ve>",
    }
    shown = Shown(steps, tokens, "#", SECONDS, 62.4, lambda key, usual: words.get(key, usual))
    stock = shown
    if name in ("llava_next_video", "video_llava"):  # which read the tokens off the pixels, two patches high
        stock = Shown(steps, 4, "#", SECONDS, 62.4, shown.word)
        patches = 2 * 2 * stock.tokens
        shown = Shown(
            steps, patches + 1 if name == "video_llava" else patches // 4, "#", SECONDS, 62.4, shown.word
        )
    assert FAMILIES[name].text(shown) == stock_text(name, stock, monkeypatch)


def test_numbers_in_words():
    told = {
        0: "zero",
        8: "eight",
        16: "sixteen",
        20: "twenty",
        64: "sixty-four",
        100: "one hundred",
        128: "one hundred and twenty-eight",
        990: "nine hundred and ninety",
    }
    assert {number: in_words(number) for number in told} == told


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_only_the_answer_is_learned_and_generation_starts_where_it_does(checkpoints, name):
    checkpoint = checkpoints(name)
    make, items = collator(checkpoint), [item(0), item(2)]
    batch = make(items)
    asked = make.rows([(one, make.prompts.request, "") for one in items], left=True, learned=False)
    for row, one in enumerate(items):
        learned = batch["labels"][row] != -100
        told = checkpoint.tokenizer.decode(batch["input_ids"][row][learned])
        end = (
            "</s>"
            if checkpoint.template is None
            else {"i": "<end_of_utterance>", "s": "<end_of_utterance>"}.get(
                name[0] if name != "internvl" else "", "<|im_end|>"
            )
        )
        assert told.strip() == one.clip.captions["en"][0] + end
        assert torch.equal(batch["labels"][row][learned], batch["input_ids"][row][learned])
        given = batch["input_ids"][row][batch["attention_mask"][row].bool() & ~learned]
        assert torch.equal(given, asked["input_ids"][row][asked["attention_mask"][row].bool()])
        placed = int((given == make.prompts.token_id).sum())
        assert placed == make.see(one)[1].steps * make.see(one)[1].tokens + (name == "llava_onevision")
    assert bool((asked["attention_mask"][:, -1] == 1).all())


def test_questions_are_drawn_as_for_the_embedded_base(checkpoints):
    question = Question("object", "what runs?", ("a cat", "a dog"), 1)
    make = collator(checkpoints("qwen2_5_vl"), question_share=1.0)
    batch = make([item(1, questions=[question])])
    decode = checkpoints("qwen2_5_vl").tokenizer.decode
    assert "what runs?" in decode(batch["input_ids"][0])
    assert decode(batch["labels"][0][batch["labels"][0] != -100]) == "a dog<|im_end|>"


def test_odd_frames_are_joined_with_the_last_one_repeated(checkpoints):
    one, make = item(1, 3), collator(checkpoints("qwen2_5_vl"))
    one = Item(one.clip, one.frames, one.times, 1, 0, np.arange(6, dtype=np.float32).reshape(3, 2))
    batch = make([one])
    assert batch["video_grid_thw"].tolist() == [[2, 2, 4]]
    assert batch["frame_features"].tolist() == [[[1.0, 2.0], [4.0, 5.0]]]


def test_numbers_are_looked_for_where_processors_look(tmp_path):
    files = {NESTED: '{"image_processor": {"a": 1}}', "preprocessor_config.json": '{"a": 2}'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_numbers(str(tmp_path)) == {"a": 1}
    (tmp_path / "video_preprocessor_config.json").write_text('{"a": 3}')
    assert read_numbers(str(tmp_path)) == {"a": 3}
    (tmp_path / NESTED).write_text('{"video_processor": {"a": 4}}')
    assert read_numbers(str(tmp_path)) == {"a": 4}
    with pytest.raises(ValueError, match="nothing says how its pixels are made"):
        read_numbers(str(tmp_path.parent))


def test_what_cannot_be_used_is_named(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="base: .*no configuration of a model found there"):
        read_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="of model type 'llama'; allowed: released, smolvlm"):
        read_checkpoint(str(tmp_path))
    checkpoint = checkpoints("llava_onevision")
    blind = replace(checkpoint, template="{{ messages[0].role }}")
    with pytest.raises(ValueError, match="chat template does not show a video; expected '<video>'"):
        collator(blind)([item(0)])
    lacking = replace(checkpoint, numbers={"size": {"height": 8, "width": 8}})
    with pytest.raises(ValueError, match="resample: missing among the numbers"):
        collator(lacking)([item(0)])


def test_which_bases_are_checkpoints_of_the_hub(checkpoints):
    released = Path(__file__).parents[1] / "vqlora" / "assets" / "kinevlm"
    assert not is_hub("released") and not is_hub(str(released))
    assert is_hub(checkpoints("smolvlm").source) and is_hub("owner/name")
