"""The embedded base: its interface, what it refuses; saving, caching and sharing a clip change nothing."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vqlora.base import RELEASED, SPECIAL_TOKENS, build_tokenizer, check_released, load_base, tiny

IMAGE, EMB, CAP = (SPECIAL_TOKENS.index(token) for token in ("<image>", "<emb>", "<cap>"))


@pytest.fixture(scope="module")
def model():
    return tiny(seed=0)[0]


def rows(frames: int, *tails):
    """Token ids [rows, L]: the prefix of a clip, then each tail."""
    return torch.tensor([[1, *[IMAGE] * (4 * frames), EMB, CAP, *tail] for tail in tails])


def clip(frames: int, seed: int = 0, clips: int = 1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(clips, frames, 3, 64, 64, generator=generator) * 2 - 1
    return {"pixel_values": pixels, "frame_times": torch.linspace(0, 1, frames).repeat(clips, 1)}


def test_saved_model_is_bit_equal_and_known_to_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = rows(2, [9, 10])
    with torch.no_grad():
        assert torch.equal(model(ids, **clip(2)).logits, again(ids, **clip(2)).logits)
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()


def test_rows_that_share_a_clip_equal_rows_with_a_clip_each(model):
    ids = rows(2, [9, 10], [11, 12])
    with torch.no_grad():
        shared = model(ids, **clip(2)).logits
        alone = torch.cat([model(row[None], **clip(2)).logits for row in ids])
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


def test_generation_with_and_without_cache_agree(model):
    ids = rows(3, [])
    said = [
        model.generate(ids, **clip(3), max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    ]
    assert torch.equal(*said)


def test_frames_do_not_mix_in_the_vision_tower(model):
    seen, changed = clip(3)["pixel_values"][0], clip(3)["pixel_values"][0].clone()
    changed[1] += 0.5
    with torch.no_grad():
        before, after = model.model.vision_tower(seen), model.model.vision_tower(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.allclose(before[1], after[1])


def test_frame_times_matter(model):
    ids, seen = rows(2, [9]), clip(2)
    with torch.no_grad():
        late = model(ids, pixel_values=seen["pixel_values"], frame_times=torch.tensor([[0.5, 1.0]])).logits
        assert not torch.allclose(model(ids, **seen).logits, late)


def test_retrieval_vector_is_read_at_the_last_emb_and_has_unit_length(model):
    ids = torch.tensor([[1, EMB, 9, EMB, 0], [1, 9, 10, 11, EMB]])
    hidden = torch.randn(
        2, 5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    found = model.embed(hidden, ids)
    wanted = torch.nn.functional.normalize(model.embed_head(hidden[[0, 1], [3, 4]]), dim=-1)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="<emb>"):
        model.embed(hidden, torch.full((2, 5), 9))


def test_wrong_number_of_image_tokens_is_refused_with_both_numbers(model):
    with pytest.raises(ValueError, match=r"8 <image> tokens.*12 visual tokens"):
        model(rows(2, [9]), **clip(3))


def test_tokenizer_reads_chinese_by_characters_and_knows_what_it_does_not_know():
    tokenizer = build_tokenizer(["cat", "猫", "向", "，"])
    ids = tokenizer("cat 猫向，dog", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["cat", "猫", "向", "，", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))


def test_released_base_loads_and_covers_the_benchmark_vocabulary():
    from vqlora.data.kinemoji.language import vocabulary

    model, tokenizer = load_base()
    assert not {
        word for word in vocabulary() if tokenizer.convert_tokens_to_ids(word) == tokenizer.unk_token_id
    }
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_tampered_weights_are_refused(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(RELEASED, folder)
    weights = folder / "model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(bytes(spoiled))
    with pytest.raises(ValueError, match="SHA-256"):
        check_released(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="make 02"):
        check_released(folder)
