"""An audio stream beside the frames: what is heard, the tower that hears it, its adapters and gates."""

from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from little_models import lively
from safetensors import safe_open
from settings_like import settings_like

import vqlora
from vqlora import metrics, runs, train
from vqlora.adapter.context import FrameContext
from vqlora.adapter.features import calibrate_features
from vqlora.base import RELEASED, tiny
from vqlora.data.batches import ClipDataset, Collator, Layout
from vqlora.data.kinemoji.audio import PITCH_HZ, RATE_HZ, TONE_S
from vqlora.data.kinemoji.encode import write_video
from vqlora.data.kinemoji.language import vocabulary
from vqlora.data.kinemoji.write import write_domain
from vqlora.data.parts import clips_of
from vqlora.evaluate import Reader, evaluate
from vqlora.experiments import ListenSettings
from vqlora.frames.container import VideoError
from vqlora.kinesound import clock
from vqlora.modalities import describe, target_modules
from vqlora.modalities.rows import frame_rows
from vqlora.quantize import load_quantized
from vqlora.sound import align, store
from vqlora.sound.bands import BANDS, HIGHEST_HZ, LOWEST_HZ, WINDOWS, band_energies
from vqlora.sound.track import read_track
from vqlora.store import RunStore, run_key
from vqlora.temporal import SOUND_FEATURES, standardise, window_features

ALL = ("vision", "fusion", "text", "audio")


def tone(hertz: float, start_s: float, length_s: float, whole_s: float = 4.0) -> np.ndarray:
    t = np.arange(int(whole_s * RATE_HZ)) / RATE_HZ
    return np.where((t >= start_s) & (t < start_s + length_s), np.sin(2 * np.pi * hertz * t), 0.0)


def eared(seed: int = 0):
    """(a lively model that listens, its tokenizer)."""
    model, tokenizer = lively(seed)
    return align.with_ear(model, seed=seed), tokenizer


def inputs_of(tokenizer, clips: int = 2, frames: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    rng, layout = torch.Generator().manual_seed(seed), Layout(tokenizer)
    ids = layout.prefix(frames, WINDOWS) + [layout.cap, 9, 10, layout.eos]
    sound = 4 * torch.rand(clips, WINDOWS, BANDS, generator=rng)
    sound = sound * (torch.rand(clips, WINDOWS, 1, generator=rng) > 0.7)
    return {"input_ids": torch.tensor([ids] * clips), "labels": torch.tensor([ids] * clips), "sound": sound,
            "pixel_values": torch.rand(clips, frames, 3, 64, 64, generator=rng) * 2 - 1,
            "frame_times": torch.linspace(0, 1, frames).expand(clips, frames)}  # fmt: skip


# -- what is heard


@pytest.mark.parametrize("hertz", [150.0, *list(PITCH_HZ.values())[::5], 3000.0])
def test_a_tone_is_heard_in_its_band_and_while_it_sounds(hertz):
    found = band_energies(tone(hertz, 1.0, 1.0))
    edges = np.geomspace(LOWEST_HZ, HIGHEST_HZ, BANDS + 1)
    assert found.shape == (WINDOWS, BANDS) and found.dtype == np.float32
    sounding = np.arange(WINDOWS * 7 // 24, WINDOWS * 11 // 24)  # wholly inside, with the weights' tails
    for window in sounding:
        band = int(found[window].argmax())
        assert edges[band] <= hertz <= edges[band + 1]
    # a sine has power 1/2; what leaks over an edge of the band is less than two thirds of it
    assert np.all(np.abs(found[sounding].max(axis=1) - np.log10(0.5e6)) < 0.5)
    silent = np.r_[: WINDOWS * 5 // 24, WINDOWS * 13 // 24 : WINDOWS]
    assert not found[silent].any()


def test_neighbouring_tones_of_the_benchmark_fall_into_different_bands():
    bands = [int(band_energies(tone(hertz, 1.0, TONE_S)).max(axis=0).argmax()) for hertz in PITCH_HZ.values()]
    assert len(set(bands)) == len(PITCH_HZ)


def test_silence_is_zero_and_louder_is_more():
    assert not band_energies(np.zeros(8000)).any() and not band_energies(np.zeros(0)).any()
    loud, soft = (band_energies(level * tone(500, 0, 4)) for level in (1.0, 0.1))
    assert np.allclose(loud.max() - soft.max(), 2, atol=1e-2), "a tenth of the pressure is two bels less"
    assert np.array_equal(loud, band_energies(tone(500, 0, 4)))
    with pytest.raises(ValueError, match=r"samples: shape \(2, 3\); expected \[N\]"):
        band_energies(np.zeros((2, 3)))


def test_a_track_comes_back_in_time_and_a_file_without_one_is_silent(tmp_path):
    frames = np.zeros((32, 64, 64, 3), np.uint8)
    sound = 0.5 * tone(700, 1.5, 0.25).astype(np.float32)
    write_video(tmp_path / "loud.mp4", frames, sound)
    write_video(tmp_path / "mute.mp4", frames)
    heard = read_track(tmp_path / "loud.mp4")
    assert len(heard) == len(sound) and np.corrcoef(heard, sound)[0, 1] > 0.99
    cut = read_track(tmp_path / "loud.mp4", 1.0, 2.0)
    assert np.array_equal(cut, heard[RATE_HZ : 2 * RATE_HZ])
    mute = read_track(tmp_path / "mute.mp4")
    assert len(mute) == 4 * RATE_HZ and not mute.any() and not band_energies(mute).any()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="bad.mp4: its sound cannot be decoded") as fault:
        read_track(tmp_path / "bad.mp4")
    assert "\n" not in str(fault.value)


# -- clips


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rendered")
    write_domain(root, "visual", {"train": 4, "val": 2, "test": 3}, 0, 1, progress=False, languages=("en",))
    return root


@pytest.mark.parametrize("part, count", [("train", 4), ("test", 3)])
def test_shuffled_runs_get_the_sound_of_another_clip(rendered, part, count):
    own, other = (settings_like("vqlora", domain="visual", sound=sound) for sound in ("own", "other"))
    heard = []
    for settings in (own, other):
        clips, frames, _ = clips_of(rendered, settings, part, count)
        data = ClipDataset(clips, frames, 2)
        heard.append({data[i].clip.id: data[i].sound for i in range(len(data))})
    mine, others = heard
    for clip, sound in mine.items():
        assert np.array_equal(sound, band_energies(read_track(rendered / f"visual/videos/{part}/{clip}.mp4")))
        assert not np.array_equal(others[clip], sound)
        assert sum(np.array_equal(others[clip], own) for own in mine.values()) == 1
    silent = clips_of(rendered, settings_like(domain="visual"), part, count)
    assert ClipDataset(*silent[:2], 2)[0].sound is None


def test_tracks_are_decoded_once(rendered, monkeypatch):
    settings = settings_like("vqlora", domain="visual", sound="own")
    clips, frames, _ = clips_of(rendered, settings, "val", 2)
    monkeypatch.setattr(store, "read_track", lambda *_: pytest.fail("decoded again"))
    assert set(store.sounds_of(clips, frames)) == {clip.id for clip in clips}
    with pytest.raises(ValueError, match="sound: 'mine' is not known; allowed: own, other"):
        store.sounds_of(clips, frames, "mine")
    with pytest.raises(ValueError, match="sound: 'other' needs two clips at least, got 1"):
        store.sounds_of(clips[:1], frames, "other")


def test_training_and_evaluation_hear_the_same(rendered):
    settings = settings_like("vqlora", domain="visual", sound="own")
    clips, frames, _ = clips_of(rendered, settings, "test", 3)
    model, tokenizer = tiny(words=vocabulary())
    model = align.with_ear(model)
    data = ClipDataset(clips, frames, 2)
    batch = Collator(tokenizer)([data[i] for i in range(3)])
    placed = (batch["input_ids"] == model.config.image_token_id).sum(dim=1)
    assert batch["sound"].shape == (3, WINDOWS, BANDS) and placed.tolist() == [8 + WINDOWS] * 3
    reader = Reader(model, tokenizer, data, "en", 4)
    with torch.no_grad():
        vectors = reader._encode(range(3))[1]
        shown = {key: batch[key] for key in ("pixel_values", "frame_times", "sound")}
        ids = torch.tensor([reader.layout.prefix(2, WINDOWS)] * 3)
        wanted = model.embed(model(ids, **shown).last_hidden_state, ids)
    assert np.allclose(vectors, wanted.numpy(), atol=1e-5)


# -- the model


def test_a_deaf_model_is_as_it_was():
    model, tokenizer = tiny()
    with safe_open(RELEASED / "model.safetensors", "pt") as released:
        names = {name.split(".layers.")[0] for name in released.keys()}  # noqa: SIM118  it is no mapping
    assert {name.split(".layers.")[0] for name in model.state_dict()} - {"lm_head.weight"} == names
    assert not describe(model).audio
    with pytest.raises(ValueError, match="'audio' is not a part of kinevlm; allowed: vision, fusion, text"):
        target_modules(model, ("audio",))
    times = torch.rand(2, 3)
    angle = times[..., None] * torch.pi * 2.0 ** (torch.arange(16, dtype=torch.float32) * 0.4)
    assert torch.equal(clock(times), torch.cat([angle.sin(), angle.cos()], dim=-1))
    with pytest.raises(ValueError, match="sound: this model has no audio tower"):
        model(**inputs_of(tokenizer))


def test_an_ear_changes_nothing_until_something_is_heard():
    deaf, tokenizer = lively()
    model, inputs = align.with_ear(deaf), inputs_of(tokenizer)
    layout, sound = Layout(tokenizer), inputs.pop("sound")
    silent = {**inputs, "input_ids": torch.tensor([layout.prefix(2) + [layout.cap, 9]] * 2), "labels": None}
    with torch.no_grad():
        assert torch.equal(model(**silent).logits, deaf(**silent).logits)
        heard, other = (model(**inputs, sound=s).logits for s in (sound, sound.flip(0)))
    behind = 1 + 8
    assert torch.equal(heard[:, :behind], other[:, :behind]) and not torch.equal(heard, other)
    with pytest.raises(ValueError, match="sound: shape .* expected .B, S, 32."):
        model(**inputs, sound=sound[..., :5])
    with pytest.raises(ValueError, match="audio_bands: 32; allowed: 0"):
        align.with_ear(model)


def test_it_answers_behind_a_cache_as_without():
    model, tokenizer = eared()
    inputs = inputs_of(tokenizer)
    inputs.pop("labels")
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with torch.no_grad():
        for _ in range(3):
            logits = model(**inputs).logits[:, -1]
            logits[:, tokenizer.eos_token_id] = -torch.inf
            token = logits.argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
    assert torch.equal(said, inputs["input_ids"])


def test_windows_are_told_from_frames_and_clips():
    model, tokenizer = eared()
    inputs = inputs_of(tokenizer)
    rows = frame_rows(model, inputs)
    first = 4 + 2  # two frames of two clips, then the clips
    assert rows.heard.tolist() == [0] * WINDOWS + [1] * WINDOWS
    windows = torch.arange(2 * WINDOWS).view(2, WINDOWS) + first
    assert torch.equal(rows.index("sound", (2, WINDOWS, 64)), windows)
    assert torch.equal(rows.tokens[:, 9 : 9 + WINDOWS], windows)
    assert rows.tokens[:, 1:9].tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    assert rows.tokens[1, 9 + WINDOWS :].tolist() == [5] * 5
    with pytest.raises(ValueError, match="2 frames and 23 of sound cannot fill evenly"):
        frame_rows(model, {**inputs, "sound": inputs["sound"][:, 1:]})
    known = describe(model)
    assert known.of("model.audio_tower.linear_1") == "audio"
    assert target_modules(model, ("audio",)) == [f"model.audio_tower.linear_{n}" for n in (1, 2)]


# -- adapters


def test_adapters_start_as_the_base_and_audio_has_ranks_of_its_own():
    model, tokenizer = eared()
    model, inputs = load_quantized(model, "nf4", compute_dtype="fp32"), inputs_of(tokenizer)
    held = model.vqlora_precision
    assert "model.audio_tower.linear_1" in held.quantized and "model.audio_tower.time" in held.kept
    with torch.no_grad():
        before = model(**inputs).logits
    ranks = {"vision": 2, "fusion": 2, "text": 2, "audio": 5}
    config = vqlora.VQLoraConfig(modalities=ALL, ranks=ranks, gate="rank")
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, before)
    report = vqlora.audit(adapted, inputs)
    audio = adapted.get_base_model().model.audio_tower.linear_1
    assert audio.r["default"] == 5 and audio.layout == "sound" and "audio" in str(report)
    adapted.train()
    adapted(**inputs).loss.backward()
    assert audio.lora_B["default"].weight.grad.abs().sum() > 0


def test_gates_read_windows_as_they_read_frames():
    model, tokenizer = eared()
    names, inputs = ["motion", "median_distance"], inputs_of(tokenizer)
    config = vqlora.VQLoraConfig(modalities=ALL, r=2, gate="scalar", feature_names=names)
    adapted = peft.get_peft_model(model, config).eval()
    layer = adapted.get_base_model().model.audio_tower.linear_1
    torch.nn.init.normal_(layer.lora_gate["default"].weight)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(layer.gate_of_rows("default", (2, WINDOWS, 64))))
    with torch.no_grad():
        adapted(**inputs)
        louder = {**inputs, "sound": inputs["sound"].clone()}
        louder["sound"][1, 7] += 3
        adapted(**louder)
        found = FrameContext.of(adapted).frames.features("default", config)
    clip = torch.arange(2).repeat_interleave(WINDOWS)
    wanted = window_features(louder["sound"].flatten(0, 1), clip, config.feature_names)
    assert torch.equal(found[6:], standardise(wanted, config.sound_mean, config.sound_std))
    assert config.sound_mean == [SOUND_FEATURES[name][0] for name in config.feature_names]
    moved = (seen[0] != seen[1]).flatten(1).nonzero().tolist()
    assert [1, 7] in moved and all(row == 1 and place in (7, 8) for row, place in moved)
    measured = calibrate_features(adapted, config, [louder])
    assert np.allclose(measured.sound_mean, wanted.double().mean(0), atol=1e-6)


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_controls_hold_for_windows_too(control):
    model, tokenizer = eared()
    config = vqlora.VQLoraConfig(modalities=ALL, r=2, gate="rank", control=control)
    adapted, inputs = peft.get_peft_model(model, config).eval(), inputs_of(tokenizer)
    with torch.no_grad():
        adapted(**inputs)
        found = FrameContext.of(adapted).frames.features("default", config)[6:]
    clip = torch.arange(2).repeat_interleave(WINDOWS)
    true = window_features(inputs["sound"].flatten(0, 1), clip)
    true = standardise(true, config.sound_mean, config.sound_std)
    assert not torch.allclose(found, true)
    same = torch.equal(found.sort(dim=0).values, true.sort(dim=0).values)
    assert same == (control == "shuffled")


# -- learning to listen, and a run


@pytest.fixture(scope="module")
def listening(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "load_base", lambda name: tiny(words=vocabulary()))
        lesson = ListenSettings(steps=2, batch_size=2, warmup_steps=1)
        folder = tmp_path_factory.mktemp("bases")
        made = align.make_listening_base(folder, lesson, progress=False)
        patch.setattr(align, "align", lambda *_, **__: pytest.fail("taught again"))
        assert align.make_listening_base(folder, lesson, progress=False) == made
        other = lesson.model_copy(update={"seed": 1})
        with pytest.raises(pytest.fail.Exception, match="taught again"):
            align.make_listening_base(folder, other, progress=False)
    return made


def test_the_tower_alone_learns(listening):
    taught, _ = vqlora.base.load_base(str(listening))
    base, _ = tiny(words=vocabulary())
    fresh, learned = align.with_ear(base).state_dict(), taught.state_dict()
    moved = {name for name in fresh if not torch.equal(fresh[name].to(torch.bfloat16).float(), learned[name])}
    assert moved and all(name.startswith("model.audio_tower.") for name in moved)


def test_runs_are_made_once_and_hear_what_they_are_given(rendered, listening, tmp_path, monkeypatch):
    quick = partial(evaluate, scorer=metrics.CaptionScorer("zh"), max_new_tokens=4)
    monkeypatch.setattr(train, "evaluate", quick)
    same = {"domain": "visual", "base": str(listening), "steps": 2, "eval_part": "test", "eval_clips": 3}
    same |= {"gate": "none", "compute_dtype": "fp32"}
    asked = [settings_like("vqlora", **same),
             settings_like("vqlora", **same, sound="own", modalities=ALL),
             settings_like("vqlora", **same, sound="other", modalities=ALL),
             settings_like("vqlora", **same, sound="own", modalities=ALL, ranks={"audio": 0})]  # fmt: skip
    made = runs.run_grid(asked, RunStore(tmp_path), 0, data_root=rendered)
    assert len({run.metrics["nll"] for run in made}) == 4 and len({run.key for run in made}) == 4
    silent, own, other, fixed = (run.cost["trainable_parameters"] for run in made)
    assert own == other > fixed == silent
    monkeypatch.setattr(train, "execute", lambda *_, **__: pytest.fail("made again"))
    again = runs.run_grid(asked, RunStore(tmp_path), 0, data_root=rendered)
    assert [run.metrics for run in again] == [run.metrics for run in made]


def test_identity_sees_sound_only_where_there_is_some():
    keys = [run_key(settings_like("vqlora", **more), "data", "base", "code")
            for more in ({}, {"sound": "own"}, {"sound": "other"})]  # fmt: skip
    assert len(set(keys)) == 3
    codes = runs._codes([settings_like("vqlora"), settings_like("vqlora", sound="own")], None)
    assert codes[0] != codes[1]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sound": "loud"}, "sound"),
        ({"sound": "own", "also_frames": (4,)}, "sound: 'own' does not go with judge, languages or also_*"),
        ({"modalities": ALL}, "modalities: 'audio' needs sound, own or other; allowed: vision, fusion, text"),
    ],
)
def test_settings_name_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        settings_like("vqlora", **change)
