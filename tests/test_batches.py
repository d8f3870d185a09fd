"""Batches are a function of (seed, epoch, index), and hold what was chosen."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vqlora.data import batches
from vqlora.data.batches import (
    SPECIAL_TOKENS,
    ClipDataset,
    Collator,
    Layout,
    frame_times,
    pixels,
    shuffled,
)
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, Question, TrueEvent
from vqlora.data.kinemoji.encode import write_video
from vqlora.frames import select_frames
from vqlora.frames.scores import score_frames

WORDS = "the dog cat spins jumps what how many ? one two".split()
QUESTIONS = (Question("what", "what spins ?", ("dog", "cat"), 0),
             Question("count", "how many ?", ("one", "two"), 1))


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


# --- items


def drawn(clips, lengths=None):
    """A store of frames in memory whose pixels are the frame's number."""
    lengths = lengths or [40] * len(clips)
    numbers = [np.arange(n, dtype=np.uint8)[:, None, None, None] for n in lengths]
    return ArrayStore(clips, [np.broadcast_to(array, (len(array), 4, 4, 3)) for array in numbers])


@pytest.fixture
def clips():
    captions = {"en": ("the dog spins", "the cat jumps", "dog spins"), "es": ("dog",)}
    events = (TrueEvent("dog", "spin", 3, 6),)
    return [Clip(f"c{i}", Path(f"c{i}.mp4"), "train", captions, QUESTIONS, events=events) for i in range(6)]


def test_items_hold_the_chosen_frames_and_their_times(clips):
    item = ClipDataset(clips, drawn(clips), frames=4)[1]
    assert item.frames[:, 0, 0, 0].tolist() == [5, 15, 25, 35] and item.clip.id == "c1"
    assert item.times.dtype == np.float32
    np.testing.assert_allclose(item.times, np.array([5, 15, 25, 35]) / 39, rtol=1e-6)
    assert frame_times(np.array([0]), 1).tolist() == [0.0]
    assert frame_times(np.array([0, 39]), 40).tolist() == [0.0, 1.0]


def test_a_clip_shorter_than_asked_repeats_frames_in_place(clips):
    data = ClipDataset(clips[:3], drawn(clips[:3], [3, 40, 1]), frames=4)
    assert data[0].frames[:, 0, 0, 0].tolist() == [0, 0, 1, 2]
    assert data[2].frames[:, 0, 0, 0].tolist() == [0] * 4 and data[2].times.tolist() == [0.0] * 4


def test_clips_that_the_store_lacks_are_left_out_of_the_data_set(clips):
    data = ClipDataset(clips, drawn(clips[2:4]))
    assert [clip.id for clip in data.clips] == ["c2", "c3"] and len(data) == 2
    with pytest.raises(ValueError, match="none of the 1 clips"):
        ClipDataset(clips[:1], drawn(clips[2:]))


def test_random_frames_depend_on_seed_epoch_and_index_only(clips):
    def chosen(seed, index, select="mixed"):
        data = ClipDataset(clips, drawn(clips), frames=8, select=select, seed=seed)
        for other in (3, 1, 4):
            data[other]  # what was asked before must not matter
        return data[index].frames[:, 0, 0, 0].tolist()

    assert chosen(0, 2) == chosen(0, 2)
    assert len({tuple(chosen(0, 2 + 6 * epoch, "jittered")) for epoch in range(6)}) > 3
    assert len({tuple(chosen(seed, 2, "jittered")) for seed in range(6)}) > 3
    assert ClipDataset(clips, drawn(clips))[6 * 5 + 2].epoch == 5


def test_a_policy_can_be_a_function_of_the_clip(clips):
    def last(footage, k, rng):
        return np.arange(footage.n_frames - k, footage.n_frames)

    assert ClipDataset(clips, drawn(clips), 2, last)[0].frames[:, 0, 0, 0].tolist() == [38, 39]
    assert 4 in ClipDataset(clips, drawn(clips), 2, "cover")[0].frames[:, 0, 0, 0]


def moving(clips, seed=0):
    """Still, noisy frames in which a square moves from frame 20 to 25."""
    rng = np.random.default_rng(seed)
    films = rng.normal(100, 0.5, (len(clips), 40, 64, 64, 3))
    for t in range(40):
        x = 8 + 6 * min(max(t - 20, 0), 5)
        films[:, t, 24:40, x:x + 16] += 80
    return ArrayStore(clips, [film.clip(0, 255).astype(np.uint8) for film in films])


def test_frames_are_chosen_by_the_scores_that_the_gate_reads_and_scored_once(clips, monkeypatch):
    calls = []
    monkeypatch.setattr(batches, "score_frames", lambda frames: calls.append(1) or score_frames(frames))
    store = moving(clips)
    data = ClipDataset(clips, store, 6, "cumulative-coverage", features=True)
    item = data[1]
    numbers = np.rint(item.times * 39).astype(int)
    assert numbers.tolist() == select_frames(store[1], 6, "cumulative-coverage").tolist()
    assert sum(20 <= n <= 25 for n in numbers) >= 3
    np.testing.assert_array_equal(item.features, score_frames(store[1]).features()[numbers])
    assert data[1 + 6 * 4].features.tolist() == item.features.tolist()  # a later epoch
    assert data.item(1, 3).frames.shape[0] == 3 and len(calls) <= 2


def test_features_reach_the_batch_only_where_they_are_asked_for(tokenizer, clips):
    plain, scored = (ClipDataset(clips, moving(clips), 4, features=asked) for asked in (False, True))
    batch = Collator(tokenizer)([scored[0], scored[1]])
    assert batch["frame_features"].shape == (2, 4, 6) and batch["frame_features"].dtype == torch.float32
    assert "frame_features" not in Collator(tokenizer)([plain[0]])


def test_policies_of_packets_need_one_packet_a_frame(clips, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, moving(clips[:1])[0])
    clip = dataclasses.replace(clips[0], path=path)
    data = ClipDataset([clip], ArrayStore([clip], [moving([clip])[0]]), 6, "packets")
    assert np.rint(data[0].times * 39).tolist() == select_frames(path, 6, "packets").tolist()
    short = ClipDataset([clip], ArrayStore([clip], [moving([clip])[0][:30]]), 6, "packets")
    with pytest.raises(ValueError, match="clip c0: .*a.mp4 has 40 packets for 30 frames"):
        short[0]


# --- batches


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_rows_have_the_layout_that_the_model_reads(tokenizer, clips):
    data = ClipDataset(clips, drawn(clips), frames=2)
    batch = Collator(tokenizer, ("caption", "retrieval"), 0)([data[0]])
    row = words(tokenizer, batch["input_ids"][0])
    captions = clips[0].captions["en"]
    assert row in {f"<bos> {'<image> ' * 8}<emb> <cap> {caption} <eos>" for caption in captions}
    learned = batch["labels"][0] != -100
    assert words(tokenizer, batch["labels"][0][learned]) == row.split("<cap> ")[1]
    assert torch.equal(batch["labels"][0][learned], batch["input_ids"][0][learned])
    assert words(tokenizer, batch["text_ids"][0]) in {f"<bos> {caption} <emb>" for caption in captions}
    batch = Collator(tokenizer, ("question",), 0)([data[0]])
    rows = {f"<bos> {'<image> ' * 8}<emb> <qst> {q} <ans> {a} <eos>"
            for q, a in (("what spins ?", "dog"), ("how many ?", "two"))}
    assert words(tokenizer, batch["input_ids"][0]) in rows and "text_ids" not in batch
    assert words(tokenizer, batch["labels"][0][batch["labels"][0] != -100]) in {"dog <eos>", "two <eos>"}


def test_padding_is_on_the_right_masked_and_never_learned(tokenizer, clips):
    data = ClipDataset(clips, drawn(clips), frames=2)
    batch = Collator(tokenizer, seed=1)([data[i] for i in range(6)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert batch["text_ids"].shape == batch["text_mask"].shape
    for ids, mask in ((batch["input_ids"], batch["attention_mask"]), (batch["text_ids"], batch["text_mask"])):
        assert torch.equal(mask.bool(), ids != tokenizer.pad_token_id)
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).any()  # the case was really tried


def test_pixels_are_scaled_and_channels_come_first():
    frames = np.zeros((2, 4, 5, 3), np.uint8)
    frames[1, 2, 3] = (255, 51, 0)
    batch = pixels([frames, np.full((2, 4, 5, 3), 255, np.uint8)])
    assert batch.shape == (2, 2, 3, 4, 5) and batch.dtype == torch.float32 and batch.is_contiguous()
    np.testing.assert_allclose(batch[0, 1, :, 2, 3].numpy(), [1.0, -0.6, -1.0], atol=1e-6)
    assert (batch[1] == 1).all() and batch[0, 0].max() == -1
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 3\), \(2, 5, 5, 3\)"):
        pixels([frames, np.zeros((2, 5, 5, 3), np.uint8)])


def test_batches_depend_on_seed_epoch_and_index_not_on_order_or_company(tokenizer, clips):
    data = ClipDataset(clips, drawn(clips), frames=2, select="jittered")
    collate = Collator(tokenizer, seed=3)

    def row(items, place, collate=collate):
        batch = collate(items)
        mask, text = batch["attention_mask"][place].bool(), batch["text_mask"][place].bool()
        return (batch["pixel_values"][place].tolist(), batch["input_ids"][place][mask].tolist(),
                batch["labels"][place][mask].tolist(), batch["text_ids"][place][text].tolist())

    alone = row([data[2]], 0)
    assert row([data[i] for i in (5, 1, 2)], 2) == alone == row([data[2]], 0, Collator(tokenizer, seed=3))
    later = [row([data[2 + 6 * epoch]], 0)[1:] for epoch in range(1, 9)]
    assert len({str(x) for x in later}) > 3
    assert len({str(row([data[2]], 0, Collator(tokenizer, seed=s))[1:]) for s in range(8)}) > 3


def test_question_share_is_met_and_every_text_gets_its_turn(tokenizer, clips):
    data = ClipDataset(clips, drawn(clips), frames=1)
    layout = Layout(tokenizer)
    for share in (0.0, 0.4, 1.0):
        collate = Collator(tokenizer, seed=0, question_share=share)
        draws = [collate.draw(data[i]) for i in range(600)]
        questions = np.mean([given[0] == layout.qst for given, _, _ in draws])
        assert abs(questions - share) < 0.07
    assert len({str(text) for *_, text in draws}) == 3 and len({str(given) for given, *_ in draws}) == 2
    collate = Collator(tokenizer, seed=0)
    same = np.mean([given[1:] + learned[:-1] == text[1:-1] for given, learned, text in
                    (collate.draw(data[i]) for i in range(300)) if given[0] == layout.cap])
    assert 0.2 < same < 0.5  # the caption learned and the one retrieved by are drawn apart


def test_clips_without_questions_or_captions(tokenizer, clips):
    mute = [dataclasses.replace(clips[0], captions={}), dataclasses.replace(clips[1], questions=())]
    data = ClipDataset(mute, drawn(mute), frames=1)
    layout, collate = Layout(tokenizer), Collator(tokenizer, ("caption", "question"), question_share=0.5)
    assert all(collate.draw(data[2 * epoch])[0][0] == layout.qst for epoch in range(20))
    assert all(collate.draw(data[2 * epoch + 1])[0][0] == layout.cap for epoch in range(20))
    with pytest.raises(ValueError, match="clip c0: no 'en' caption to retrieve"):
        Collator(tokenizer)([data[0]])
    with pytest.raises(ValueError, match="clip c1: no text for question in 'en'"):
        Collator(tokenizer, ("question",))([data[1]])
    spanish = Collator(tokenizer, ("caption",), language="es")
    with pytest.raises(ValueError, match="clip c1: no text for caption in 'fr'"):
        Collator(tokenizer, ("caption",), language="fr")([data[1]])
    assert words(tokenizer, spanish([data[1]])["input_ids"][0]).endswith("<cap> dog <eos>")


def test_wrong_settings_and_tokenizers_are_refused(tokenizer):
    for tasks in (("captions",), ("retrieval",), ()):
        with pytest.raises(ValueError, match="choose from caption, question, retrieval"):
            Collator(tokenizer, tasks)
    with pytest.raises(ValueError, match="question_share is 1.5"):
        Collator(tokenizer, question_share=1.5)
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    other["model"]["vocab"]["<capt>"] = other["model"]["vocab"].pop("<cap>")
    other["added_tokens"] = []
    with pytest.raises(ValueError, match="no token <cap>"):
        Layout(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other))))


def test_texts_are_tokenised_once(tokenizer, clips):
    calls = []

    class Counting:
        def get_vocab(self):
            return tokenizer.get_vocab()

        def __call__(self, text, **options):
            calls.append(text)
            return tokenizer(text, **options)

    data, collate = ClipDataset(clips, drawn(clips), frames=1), Collator(Counting())
    for epoch in range(20):
        collate([data[i + 6 * epoch] for i in range(6)])
    assert len(calls) == len(set(calls)) <= 7


# --- the order of clips


def test_shuffled_visits_every_clip_once_an_epoch_and_can_be_resumed():
    stream = shuffled(10, 35, seed=0)
    assert [sorted(stream[10 * e:10 * e + 10] - 10 * e) for e in range(3)] == [list(range(10))] * 3
    assert not np.array_equal(stream[:10], stream[10:20] - 10)
    for start in (0, 7, 10, 29, 35):
        assert np.array_equal(shuffled(10, 35 - start, seed=0, start=start), stream[start:])
    assert not np.array_equal(shuffled(10, 35, seed=1), stream)
