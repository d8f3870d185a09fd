"""Pretraining: packing changes no score, labels say what was drawn, a finished base is not made again."""

import numpy as np
import pytest
import torch

from vqlora.config import PretrainSettings
from vqlora.data.kinemoji.domains import DOMAINS, MOTIONS, target_only_pair
from vqlora.data.kinemoji.scenes import Actor, Event, Scene, Shot, sample_scene
from vqlora.pretrain import new_model, pretrain
from vqlora.pretrain_data import (
    NOBODY,
    Pack,
    SourceClips,
    dense_labels,
    event_labels,
    mixed_frames,
    packed_mask,
)
from vqlora.pretrain_model import contrastive_loss

SMALL = PretrainSettings(
    steps=4,
    vision_steps=2,
    batch_size=4,
    warmup_steps=1,
    save_steps=2,
    processes=1,
    width=64,
    layers=1,
    vision_width=64,
    vision_layers=1,
    frames=(3,),
    vision_frames=2,
)


def scene(motion: str) -> Scene:
    """One sprite at the bottom right that moves in frames 10 to 15."""
    actors = (Actor(sprite=7, cell=3, size=24, shot=0, x=48.0, y=48.0),)
    return Scene(
        "source",
        "val",
        0,
        40,
        actors,
        (Event(0, motion, 10, 16),),
        (Shot(0, 40, "gradient", 1),),
        (),
        (),
        None,
        5,
    )


def test_packed_texts_score_as_they_would_alone():
    model, tokenizer = new_model(SMALL)
    model.eval()
    items = [SourceClips(SMALL)[8]]  # the first item of the joint stage
    pack = Pack(tokenizer, model.config.tokens_per_frame)
    batch = pack(items)
    seen = {name: batch[name] for name in ("pixel_values", "frame_times")}
    base = super(type(model), model)
    with torch.no_grad():
        together = base.forward(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            **seen,
        ).logits[0]
        prefix = batch["input_ids"][0].tolist().index(pack.ids["<emb>"]) + 1
        starts = [
            i
            for i, t in enumerate(batch["input_ids"][0].tolist())
            if t in (pack.ids["<cap>"], pack.ids["<qst>"])
        ]
        assert len(starts) > 2
        for start, end in zip(starts, [*starts[1:], len(together)], strict=True):
            row = torch.cat([batch["input_ids"][:, :prefix], batch["input_ids"][:, start:end]], dim=1)
            alone = base.forward(row, **seen).logits[0, prefix:]
            torch.testing.assert_close(together[start:end], alone, atol=1e-4, rtol=1e-4)


def test_mask_hides_other_texts_and_padding():
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[4].tolist() == [True, True, False, False, True, False]


def test_dense_labels_find_the_sprite_where_it_is_drawn():
    patches, cells = dense_labels(scene("grow"), [0])
    assert cells[0].tolist() == [NOBODY, NOBODY, NOBODY, 7]
    covered = patches[0, :, 0].reshape(4, 4)
    assert (covered[2:, 2:] == 7).all() and (covered[:2] == NOBODY).all() and (covered[:, :2] == NOBODY).all()
    where = patches[0].reshape(4, 4, 7)[2, 2]  # its patch is centred at (40, 40), the sprite at (48, 48)
    assert where[1:3] == pytest.approx([0.5, 0.5]) and where[3] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("motion", "frames", "told"),
    [
        ("left", [5, 20], True),  # it has moved by then
        ("spin", [5, 20], False),  # it turned and came back unseen
        ("spin", [5, 12], True),
        ("left", [16, 30], False),  # over before the first of the two
    ],
)
def test_motion_labels_tell_only_what_two_frames_can_show(motion, frames, told):
    labels, turns = event_labels(scene(motion), frames)
    assert (labels[0] == len(MOTIONS)).all() and (labels[1, :3] == len(MOTIONS)).all()
    assert labels[1, 3] == (MOTIONS.index(motion) if told else len(MOTIONS))
    assert turns.tolist() == [[0, 0, 0, 0], [0, 0, 0, int(told)]]


def test_turns_count_the_events_that_the_frames_show():
    actors = tuple(Actor(sprite=7 + c, cell=c, size=24, shot=0, x=16.0, y=16.0) for c in range(3))
    events = (Event(1, "spin", 4, 9), Event(0, "left", 12, 18), Event(2, "spin", 22, 27))
    drawn = Scene(
        "source", "val", 0, 40, actors, events, (Shot(0, 40, "gradient", 1),), (), (), None, 5
    )
    _, turns = event_labels(drawn, [2, 6, 10, 20, 25, 39])
    assert turns.argmax(1).tolist() == [0, 1, 1, 0, 2, 2] and turns.max(1).tolist() == [0, 1, 1, 2, 3, 3]
    _, turns = event_labels(drawn, [2, 10, 20, 25])  # the first spin is unseen: the next event is the first
    assert turns.max(1).tolist() == [0, 0, 1, 2]


def test_items_repeat_exactly_and_source_clips_show_no_target_pair():
    clips = SourceClips(SMALL)
    first, again = clips[9], SourceClips(SMALL)[9]
    assert first["captions"] == again["captions"] and np.array_equal(first["frames"], again["frames"])
    for index in range(300):
        drawn = sample_scene(DOMAINS["source"], "train", index, 0)
        assert not any(target_only_pair(drawn.actors[e.actor].sprite, e.motion) for e in drawn.events)


def test_mixed_frames_are_distinct_sorted_and_inside():
    for index in range(60):
        drawn = sample_scene(DOMAINS["source"], "train", index, 0)
        picked = mixed_frames(drawn, 8, np.random.default_rng(index))
        assert (
            len(picked) == 8 and (np.diff(picked) > 0).all() and 0 <= picked[0] and picked[-1] < drawn.frames
        )


def test_contrastive_loss_prefers_matching_pairs():
    vectors = torch.nn.functional.normalize(
        torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    scale = torch.tensor(10.0)
    assert contrastive_loss(vectors, vectors, scale) < contrastive_loss(vectors, vectors.roll(1, 0), scale)


def test_training_ends_in_a_loadable_base_and_is_not_repeated(tmp_path):
    from vqlora.base import load_base

    made = pretrain(SMALL, tmp_path)
    model, _ = load_base(str(made))
    assert model.config.text_config.hidden_size == 64
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    pretrain(SMALL, tmp_path)
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
