"""What is written is what was drawn: same seed same bytes, read back by the loaders of published formats."""

import errno
import json
import os

import av
import numpy as np
import pytest

from vqlora.data.formats import load_activitynet, load_kinemoji, load_lsmdc, load_msrvtt, load_vatex
from vqlora.data.kinemoji import encode, sheet
from vqlora.data.kinemoji.audio import PITCH_HZ, RATE_HZ, TONE_S, soundtrack
from vqlora.data.kinemoji.domains import DOMAINS
from vqlora.data.kinemoji.encode import FPS, RenderError, write_video
from vqlora.data.kinemoji.language import captions, truth
from vqlora.data.kinemoji.lexicon import LANGUAGES
from vqlora.data.kinemoji.questions import questions
from vqlora.data.kinemoji.render import render
from vqlora.data.kinemoji.scenes import sample_scene
from vqlora.data.kinemoji.sprites import load_sprites
from vqlora.data.kinemoji.write import write_domain
from vqlora.frames.reader import read_frames

COUNTS = {"train": 8, "val": 4, "devtest": 2, "test": 4}


def write(root, counts=COUNTS, *, domain="cutaways", seed=0, workers=1, **more):
    return write_domain(root, domain, counts, seed, workers, progress=False, **more)


def everything(root) -> dict[str, bytes]:
    files = [p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinemoji")
    assert write(root).rendered == sum(COUNTS.values())
    return root


def test_same_seed_same_bytes_whoever_renders(written, tmp_path):
    write(tmp_path / "again", workers=2)
    assert everything(tmp_path / "again") == everything(written)
    write(tmp_path / "other", {"val": 4}, seed=1)
    other = everything(tmp_path / "other")
    assert all(everything(written)[name] != data for name, data in other.items() if "val-" in name)


def test_each_clip_reads_back_with_all_it_was_given(written):
    ids = []
    for part, count in COUNTS.items():
        loaded = load_kinemoji(written, "cutaways", part)
        assert len(loaded.clips) == count and not loaded.left_out
        for index, clip in enumerate(loaded.clips):
            scene = sample_scene(DOMAINS["cutaways"], part, index, 0)
            assert clip.id == scene.id and clip.part == part
            assert set(clip.captions) == set(LANGUAGES)
            assert all(texts == captions(scene, language) for language, texts in clip.captions.items())
            assert clip.questions == questions(scene)
            assert [(e.name, e.motion) for e in clip.events] == truth(scene)
            starts = [e.start / FPS for e in scene.events]
            assert [s.start_s for s in clip.segments] == pytest.approx(starts)
            ids.append(clip.id)
    assert len(set(ids)) == sum(COUNTS.values())


def test_every_published_format_finds_the_videos(written):
    notes, videos = written / "cutaways" / "annotations", written / "cutaways" / "videos"
    first = captions(sample_scene(DOMAINS["cutaways"], "test", 0, 0))
    for load, folder in ((load_vatex, "vatex"), (load_activitynet, "activitynet"), (load_lsmdc, "lsmdc")):
        loaded = load(notes / folder, videos, part="test")
        assert len(loaded.clips) == COUNTS["test"] and not loaded.left_out, folder
    assert load_vatex(notes / "vatex", videos, part="test").clips[0].captions["en"] == first
    assert load_lsmdc(notes / "lsmdc", videos, part="test").clips[0].captions["en"] == first[:1]
    retrieval = load_msrvtt(notes / "msrvtt.json", videos, part="test", protocol="1k-A")
    assert [clip.captions["en"] for clip in retrieval.clips][0] == first[:1]


def test_frames_survive_the_encoder(written):
    for part in ("train", "test"):
        scene = sample_scene(DOMAINS["cutaways"], part, 1, 0)
        drawn = render(scene, load_sprites()).astype(int)
        read = read_frames(written / "cutaways" / "videos" / part / f"{scene.id}.mp4").astype(int)
        assert read.shape == drawn.shape
        assert np.abs(read - drawn).mean() < 8
        still = np.flatnonzero(np.abs(np.diff(drawn.mean((1, 2, 3)))) < 0.5)[:5]
        assert all(np.abs(read[t + 1] - read[t]).mean() > 0.5 for t in still), "camera noise was wiped out"


def test_a_tone_marks_each_event():
    drawn = (sample_scene(DOMAINS["distractor"], "val", i, 0) for i in range(50))
    scene = next(scene for scene in drawn if len(scene.events) == 3)
    sound = soundtrack(scene, FPS)
    assert sound.shape == (scene.frames * RATE_HZ // FPS,) and 0.2 < np.abs(sound).max() <= 1
    for event in scene.events:
        tone = sound[event.start * RATE_HZ // FPS:][: int(TONE_S * RATE_HZ)]
        spectrum = np.abs(np.fft.rfft(tone, 8 * len(tone)))
        peak_hz = np.argmax(spectrum) * RATE_HZ / (8 * len(tone))
        assert peak_hz == pytest.approx(PITCH_HZ[event.motion], rel=0.03)
    loud = np.flatnonzero(np.abs(sound.reshape(scene.frames, -1)).max(1) > 0.1)
    assert min(loud) == scene.events[0].start


def test_the_file_holds_the_sound_at_the_right_moment(written):
    scene = sample_scene(DOMAINS["cutaways"], "val", 0, 0)
    with av.open(str(written / "cutaways" / "videos" / "val" / f"{scene.id}.mp4")) as container:
        pieces = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    heard = np.concatenate(pieces)
    level = np.convolve(np.abs(heard), np.ones(80) / 80, "same")
    onset_s = np.argmax(level > level.max() / 3) / RATE_HZ
    assert onset_s == pytest.approx(scene.events[0].start / FPS, abs=0.15)


def test_without_sound_there_is_no_audio_track(tmp_path):
    write(tmp_path, {"val": 1}, audio=False, languages=("en", "de"))
    with av.open(str(tmp_path / "cutaways/videos/val/cutaways-val-00000.mp4")) as container:
        assert not container.streams.audio and container.streams.video[0].frames == 40
    assert set(load_kinemoji(tmp_path, "cutaways", "val").clips[0].captions) == {"en", "de"}


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write(tmp_path)
    before = everything(tmp_path)
    videos = sorted((tmp_path / "cutaways" / "videos" / "train").iterdir())
    videos[0].unlink()
    videos[1].write_bytes(videos[1].read_bytes()[:-9])
    damaged = bytearray(videos[2].read_bytes())
    damaged[-1] ^= 1
    videos[2].write_bytes(damaged)
    record = tmp_path / "cutaways" / "rendered.jsonl"
    record.write_text("".join(record.read_text().splitlines(True)[:-1]) + '{"video_id": "cutaways-te')
    videos[0].with_name(f".{videos[0].name}.1.part").write_bytes(b"half")
    stamp = videos[3].stat().st_mtime_ns
    assert write(tmp_path).rendered == 4  # the three, and the one whose record was cut short
    assert everything(tmp_path) == before
    assert videos[3].stat().st_mtime_ns == stamp
    assert write(tmp_path).rendered == 0


def test_clips_no_longer_asked_for_are_removed(tmp_path):
    write(tmp_path, {"train": 3, "val": 2})
    assert write(tmp_path, {"train": 1, "val": 2}).rendered == 0
    assert len(list(tmp_path.rglob("*.mp4"))) == 3
    assert write(tmp_path, {"train": 1, "val": 2}, seed=5).rendered == 3  # another seed, other frames


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"domain": "sauce"}, "'sauce' is not one of source, language"),
        ({"counts": {"trian": 2}}, "part 'trian' is not one of train, val, devtest, test"),
        ({"counts": {"train": -1}}, "-1 clips"),
        ({"counts": {}}, "no clips"),
        ({"languages": ("en", "it")}, "'it' is not one of en, es, de, fr, zh"),
        ({"languages": ("de",)}, "'en' must be among them"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **{"counts": {"val": 1}, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode.os, "replace", full)
    path = tmp_path / "a.mp4"
    with pytest.raises(RenderError) as caught:
        write_video(path, np.zeros((8, 64, 64, 3), np.uint8))
    assert str(caught.value) == f"{path}: the disk is full"
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RenderError, match=r"file.*: Not a directory"):
        write(tmp_path / "file" / "below", {"val": 1})


def test_the_data_sheet_counts_and_lists_what_is_left_out(written, tmp_path):
    part = load_kinemoji(written, "cutaways", "val")
    table = sheet.statistics({("cutaways", "val"): part}, tmp_path, progress=False)
    row = table.iloc[0]
    assert (row.clips, row.clips_left_out, row.frames, row.captions) == (4, 0, 160, 100)
    assert row.events == sum(len(clip.events) for clip in part.clips) and row.duration_s == pytest.approx(20)
    assert row.questions == sum(row[c] for c in table if c.startswith("questions_")) >= 16
    wide = sheet.by_domain(table).iloc[0]
    assert (wide.val_clips, wide.train_clips, wide.frames, wide.captions_per_clip) == (4, 0, 40, 25)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(part.clips[0].path.read_bytes()[:4000])
    clips = (type(part.clips[0])(**{**vars(part.clips[0]), "path": broken}), *part.clips[1:])
    table = sheet.statistics({("cutaways", "val"): type(part)(clips)}, tmp_path, progress=False)
    assert (table.clips[0], table.clips_left_out[0], table.frames[0]) == (3, 1, 120)


def test_samples_are_rows_of_frames(written):
    clips = [("cutaways", load_kinemoji(written, "cutaways", part).clips[0]) for part in ("val", "test")]
    rows, picture = sheet.samples(clips)
    assert picture.shape == (2 * 64, 8 * 64, 3) and list(rows.domain) == ["cutaways"] * 2
    assert np.array_equal(picture[:64, :64], read_frames(clips[0][1].path)[int(rows.frames[0].split()[0])])


def test_a_video_that_occurs_twice_is_found(written, tmp_path):
    assert sheet.same_videos([written / "cutaways"]) == []
    rows = (written / "cutaways" / "rendered.jsonl").read_text().splitlines()
    again = json.loads(rows[0]) | {"video_id": "copy"}
    (tmp_path / "rendered.jsonl").write_text(json.dumps(again) + "\n")
    assert sheet.same_videos([written / "cutaways", tmp_path]) == ["copy"]
