"""Loaders read what writers write and what owners publish; a bad row costs that row, a bad file is named."""
import dataclasses
import json
import pickle

import pytest

from vqlora.data.clips import Clip, Question, Segment, TrueEvent, reasons, require_disjoint
from vqlora.data.formats import (
    attach_questions,
    load_activitynet,
    load_kinemoji,
    load_lsmdc,
    load_msrvtt,
    load_vatex,
    write_activitynet,
    write_id_list,
    write_lsmdc,
    write_msrvtt,
    write_msrvtt_1ka,
    write_questions,
    write_truth,
    write_vatex,
)
from vqlora.data.rows import FormatError

PARTS = ("train", "val", "devtest", "test")


def make_clips(videos, n=3):
    """n clips of each part with everything a clip can hold; their (empty) video files are made too."""
    videos.mkdir(parents=True, exist_ok=True)
    clips = []
    for part in PARTS:
        for i in range(n):
            name = f"source-{part}-{i:05d}"
            (videos / f"{name}.mp4").touch()
            clips.append(Clip(
                name, videos / f"{name}.mp4", part,
                {"en": (f"the dog {i} spins", "a, \"quoted\" dog"), "es": ("el perro gira",),
                 "zh": ("狗在转圈",)},
                (Question("what", "what spins ?", ("dog", "cat", "bee"), i % 3),
                 Question("count", "how many ?", ("1", "2"), 1)),
                (Segment(0.5, 1.25, "the dog spins"), Segment(2.0, 3.0, "then the cat leaves")),
                (TrueEvent("dog", "spin", 4, 10),)))
    return clips


def write_kinemoji(root, n=3):
    folder = root / "source"
    notes = folder / "annotations"
    clips = make_clips(folder / "videos", n)
    write_msrvtt(notes / "msrvtt.json", clips, durations_s=5.0)
    write_msrvtt(notes / "msrvtt.es.json", clips, durations_s=5.0, language="es")
    write_vatex(notes / "vatex", clips, durations_s=5.0)
    write_activitynet(notes / "activitynet", clips, durations_s=5.0)
    write_questions(notes / "questions.json", clips)
    write_truth(notes / "truth.jsonl", clips, {clips[0].id: {"seed": 3}})
    return clips


@pytest.mark.parametrize("part", PARTS)
def test_kinemoji_round_trip_returns_every_field(tmp_path, part):
    clips = [clip for clip in write_kinemoji(tmp_path) if clip.part == part]
    loaded = load_kinemoji(tmp_path, "source", part)
    assert loaded.left_out == ()
    assert loaded.clips == tuple(clips)
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_writing_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    for name in ("a", "b"):
        write_kinemoji(tmp_path / name)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("a", "b")]
    assert files[0] == files[1]
    for path in files[0]:
        if (tmp_path / "a" / path).is_file():
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_kinemoji_without_optional_files_still_loads(tmp_path):
    write_kinemoji(tmp_path)
    notes = tmp_path / "source" / "annotations"
    for name in ("questions.json", "truth.jsonl", "msrvtt.es.json"):
        (notes / name).unlink()
    clip = load_kinemoji(tmp_path, "source", "val").clips[0]
    assert clip.questions == () and clip.events is None and set(clip.captions) == {"en", "zh"}


def msrvtt(videos, sentences):
    return {"info": {}, "videos": videos, "sentences": sentences}


def put(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_msrvtt_official_release_in_two_files_and_splits(tmp_path):
    row = {"category": 9, "url": "u", "start time": 137.72, "end time": 149.44}
    put(tmp_path / "train_val_videodatainfo.json", msrvtt(
        [row | {"video_id": "video0", "split": "train"}, row | {"video_id": "video1", "split": "validate"}],
        [{"caption": "a", "video_id": "video0", "sen_id": 0},
         {"caption": "b", "video_id": "video1", "sen_id": 1}]))
    put(tmp_path / "test_videodatainfo.json", msrvtt(
        [row | {"video_id": "video2", "split": "test"}],
        [{"caption": "c", "video_id": "video2", "sen_id": 0}]))
    videos = touch(tmp_path / "v", "TrainVal/video0.mp4", "TrainVal/video1.webm", "Test/video2.mp4")
    got = {part: load_msrvtt(tmp_path, videos, part=part) for part in ("train", "val", "test")}
    assert {part: [c.captions["en"] for c in x.clips] for part, x in got.items()} == {
        "train": [("a",)], "val": [("b",)], "test": [("c",)]}
    assert not any(x.left_out for x in got.values())
    assert got["train"].clips[0].start_s is None  # published videos are cut: source times must not cut again
    with pytest.raises(FormatError, match="no clips of part 'devtest'; parts there: train, val, test"):
        load_msrvtt(tmp_path, videos, part="devtest")


def test_msrvtt_bad_rows_are_left_out_one_by_one(tmp_path):
    path = put(tmp_path / "m.json", msrvtt(
        [{"video_id": "a", "split": "train"}, {"video_id": "a", "split": "val"},
         {"video_id": "gone", "split": "train"}, {"video_id": "mute", "split": "train"}, {"split": "train"},
         "junk", {"video_id": "odd", "split": "trian"}],
        [{"caption": " fine\tcaption \n", "video_id": "a", "sen_id": 0},
         {"caption": "again", "video_id": "a", "sen_id": 0}, {"caption": "  ", "video_id": "a", "sen_id": 1},
         {"caption": None, "video_id": "a", "sen_id": 2},
         {"caption": "x", "video_id": "nowhere", "sen_id": 3},
         {"caption": "fine\tcaption", "video_id": "a", "sen_id": 4},
         {"caption": "x", "video_id": "gone", "sen_id": 5}, 17]))
    loaded = load_msrvtt(path, touch(tmp_path / "v", "a.mp4", "mute.mp4"), part="train")
    assert [(c.id, c.captions) for c in loaded.clips] == [("a", {"en": ("fine caption", "fine caption")})]
    got = {row.row: row.reason for row in loaded.left_out}
    assert got == {
        "a": "video listed twice; the first is kept", "gone": f"no video file: gone in {tmp_path / 'v'}",
        "mute": "no caption", "video 4": "no video_id", "video 5": "no video_id",
        "odd": "unknown split: 'trian' is not one of train, validate, devtest, test, val",
        "sentence 0": "sentence listed twice; the first is kept", "sentence 1": "empty caption",
        "sentence 2": "caption is not a text",
        "sentence 3": "no such video: 'nowhere' is not in the annotations",
        "sentence row 7": "no such video: None is not in the annotations"}
    assert all(row.source == str(path) for row in loaded.left_out)
    assert reasons(loaded.left_out)["no video_id"] == 2


def test_msrvtt_1k_a_follows_the_lists(tmp_path):
    clips = make_clips(tmp_path / "v", 2)
    write_msrvtt(tmp_path / "MSRVTT_data.json", clips, durations_s=5)
    test, train = [c for c in clips if c.part == "test"], [c for c in clips if c.part in ("train", "val")]
    write_msrvtt_1ka(tmp_path / "MSRVTT_JSFUSION_test.csv", test)
    write_id_list(tmp_path / "MSRVTT_train.9k.csv", [c.id for c in train])
    got = load_msrvtt(tmp_path, tmp_path / "v", part="test", protocol="1k-A")
    assert [(c.id, c.captions["en"]) for c in got.clips] == [(c.id, c.captions["en"][:1]) for c in test]
    got = load_msrvtt(tmp_path, tmp_path / "v", part="train", protocol="1k-A")
    assert [(c.id, c.part, len(c.captions["en"])) for c in got.clips] == [(c.id, "train", 2) for c in train]
    with pytest.raises(FormatError, match="no list of part 'val'"):
        load_msrvtt(tmp_path, tmp_path / "v", part="val", protocol="1k-A")
    write_id_list(tmp_path / "MSRVTT_train.9k.csv", [c.id for c in train + test])
    with pytest.raises(FormatError, match=f"{test[0].id} is in part"):
        load_msrvtt(tmp_path, tmp_path / "v", part="train", protocol="1k-A")


def test_msrvtt_1k_a_csv_with_bom_unknown_ids_and_short_rows(tmp_path):
    put(tmp_path / "MSRVTT_data.json", msrvtt([{"video_id": "a", "split": "train"}], []))
    put(tmp_path / "MSRVTT_JSFUSION_test.csv", "\ufeffkey,vid_key,video_id,sentence\r\n"
        "ret0,msra,a,\"one, two\"\r\nret1,msrb,b,text\r\nret2,msrc,a,again\r\nret3,msrc\r\nret4,x,c,\r\n")
    got = load_msrvtt(tmp_path, touch(tmp_path / "v", "a.mp4"), part="test", protocol="1k-A")
    assert [c.captions["en"] for c in got.clips] == [("one, two",)]
    assert {r.row: r.reason for r in got.left_out} == {
        "b": "no such video: 'b' is not in the annotations", "line 4": "video listed twice",
        "line 5": "no video_id", "c": "empty caption"}


def test_vatex_cut_and_whole_videos_two_languages_and_odd_rows(tmp_path):
    put(tmp_path / "vatex_training_v1.0.json", [
        {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["a", ""], "chCap": ["狗 "]},
        {"videoID": "-whole_one_000003_000013", "enCap": ["b"]},
        {"videoID": "lost_000000_000010", "enCap": ["c"]},
        {"enCap": ["d"]}, {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["e"]},
        {"videoID": "-whole_one_000013_000003", "enCap": ["f"]}])
    videos = touch(tmp_path / "v", "Ptf_2VRj-V0_000122_000132.mp4", "-whole_one.mkv")
    got = load_vatex(tmp_path, videos, part="train")
    assert [(c.path.name, c.start_s, c.end_s, dict(c.captions)) for c in got.clips] == [
        ("Ptf_2VRj-V0_000122_000132.mp4", None, None, {"en": ("a",), "zh": ("狗",)}),
        ("-whole_one.mkv", 3.0, 13.0, {"en": ("b",)})]
    assert [r.reason.split(";")[0].split(":")[0] for r in got.left_out] == [
        "empty caption", "no video file", "no videoID", "listed twice", "ends before it starts"]


def test_vatex_names_cover_the_whole_clip_in_whole_seconds(tmp_path):
    clips = make_clips(tmp_path / "v", 1)
    write_vatex(tmp_path, clips, durations_s=4.2)
    (clip,) = load_vatex(tmp_path, tmp_path / "v", part="test").clips
    assert clip.id.endswith("_000000_000005") and clip.end_s == 5.0 and clip.path == clips[3].path


def test_activitynet_segments_paragraphs_and_two_annotators(tmp_path):
    put(tmp_path / "val_1.json", {
        "v_a": {"duration": 10.0, "timestamps": [[0, 4.5], [4, 10.6], [8, 3], [11, 12], ["x", 2]],
                "sentences": [" One. ", "Two.", "reversed", "late", "odd"]},
        "v_b": {"duration": 10.0, "timestamps": [[0, 1]], "sentences": []}, "v_c": [], "v_d": {
            "duration": 1, "timestamps": [[0, 1]], "sentences": ["x"]}})
    put(tmp_path / "val_2.json", {"v_a": {"duration": 10.0, "timestamps": [[1, 2]], "sentences": ["Three."]}})
    got = load_activitynet(tmp_path, touch(tmp_path / "v", "v_a.mp4", "b.mp4"), part="val")
    (clip,) = got.clips
    assert clip.captions == {"en": ("One. Two.", "Three.")}
    assert clip.segments == (Segment(0, 4.5, "One."), Segment(4, 10, "Two."), Segment(1, 2, "Three."))
    rows = {r.row for r in got.left_out}
    assert rows == {"v_a segment 2", "v_a segment 3", "v_a segment 4", "v_b", "v_c", "v_d"}


def test_lsmdc_quotes_subfolders_repeated_clips_and_short_lines(tmp_path):
    name, other = "1004_Juno_00.07.01.275-00.07.02.720", "1004_Juno_01.00.00.000-01.00.02.500"
    times = "00.07.01.000\t00.07.03.000\t00.07.01.275\t00.07.02.720"
    put(tmp_path / "LSMDC16_annos_test.csv",
        f"{name}\t{times}\tSOMEONE says \"no.\r\n{name}\t{times}\tShe waves.\n{other}\t{times}\tstray\ttab\n"
        f"short\tline\n\nnowhere\t{times}\tx\n{other}\t{times}\t \n")
    videos = touch(tmp_path / "v", f"1004_Juno/{name}.avi", "1004_Juno.mkv")
    got = load_lsmdc(tmp_path, videos, part="test")
    assert [(c.id, c.captions["en"], c.start_s, c.end_s) for c in got.clips] == [
        (name, ("SOMEONE says \"no.", "She waves."), None, None), (other, ("stray tab",), 3600.0, 3602.5)]
    assert [r.row for r in got.left_out] == ["line 4", "line 7", "nowhere"]


def test_lsmdc_round_trip_with_someone(tmp_path):
    clips = [c for c in make_clips(tmp_path / "v") if c.part == "devtest"]
    lengths = {clip.id: 65.5 for clip in clips}
    write_lsmdc(tmp_path, clips, durations_s=lengths, sentences={clips[0].id: "SOMEONE spins"})
    got = load_lsmdc(tmp_path, tmp_path / "v", part="devtest")
    assert [c.captions["en"][0] for c in got.clips] == ["SOMEONE spins", "the dog 1 spins", "the dog 2 spins"]
    assert (got.clips[0].path, got.clips[0].start_s, got.clips[0].end_s) == (clips[0].path, 0.0, 65.5)


def test_questions_open_ones_numbers_and_bad_rows(tmp_path):
    path = put(tmp_path / "m.json", msrvtt([{"video_id": "video7", "split": "test"}],
                                           [{"caption": "x", "video_id": "video7", "sen_id": 0}]))
    loaded = load_msrvtt(path, touch(tmp_path / "v", "video7.mp4"), part="test")
    good = {"id": 1, "video_id": 7, "category_id": 2, "question": "who is singing?", "answer": "woman"}
    got = attach_questions(loaded, put(tmp_path / "q.json", [
        good, good | {"answer": "man"}, good | {"id": 2, "question": " "},
        good | {"id": 3, "choices": ["a", "b"]},
        good | {"id": 4, "choices": ["woman", "a", "a"]}, good | {"id": 5, "choices": "woman"},
        good | {"id": 6, "choices": ["man", "woman"], "kind": "what"}, good | {"id": 7, "video_id": 8}, 3,
        {"id": 9, "question": "is it?", "answer": "yes", "video_id": "video7"}]))
    assert got.clips[0].questions == (
        Question("who", "who is singing?", ("woman",), 0),
        Question("what", "who is singing?", ("man", "woman"), 1),
        Question("other", "is it?", ("yes",), 0))
    assert len(got.left_out) == 6 and all(r.row.startswith("question") for r in got.left_out)


BROKEN = {
    "msrvtt.json": {"{\"videos\": [": "broken JSON at line 1", "[]": "holds a list", "{}": "no list 'videos'",
                    "{\"videos\": [], \"sentences\": 3}": "no list 'sentences'"},
    "msrvtt.es.json": {"": "broken JSON at line 1", "[]": "holds a list"},
    "questions.json": {"[1, ": "broken JSON", "{}": "holds a dict"},
    "vatex/vatex_training_v1.0.json": {"nul": "broken JSON", "{}": "holds a dict"},
    "activitynet/train.json": {"}": "broken JSON", "[]": "holds a list"},
    "truth.jsonl": {"\n\n{\"video_id\": 3": "line 3 is broken", "[]": "line 1 is broken"},
}


@pytest.mark.parametrize("name, text, word",
                         [(name, text, word) for name, rows in BROKEN.items() for text, word in rows.items()]
                         + [(name, b"\xff\xfe{}", "not UTF-8") for name in BROKEN]
                         + [("msrvtt.json", None, "no such file")])
def test_a_broken_file_gives_one_line_that_names_it(tmp_path, name, text, word):
    write_kinemoji(tmp_path)
    path = tmp_path / "source" / "annotations" / name
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=word) as caught:
        load_kinemoji(tmp_path, "source", "train")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "expected" in message


def test_missing_folders_and_parts_are_named(tmp_path):
    write_kinemoji(tmp_path)
    notes = tmp_path / "source" / "annotations"
    with pytest.raises(FormatError, match="no domain 'sauce'.*there: source"):
        load_kinemoji(tmp_path, "sauce", "train")
    with pytest.raises(FormatError, match="nowhere: no such folder; expected the videos"):
        load_msrvtt(notes / "msrvtt.json", tmp_path / "nowhere", part="train")
    with pytest.raises(FormatError, match="part 'dev' is not one of train, val, devtest, test"):
        load_kinemoji(tmp_path, "source", "dev")
    with pytest.raises(FormatError, match="'1kA' is not one of"):
        load_msrvtt(notes / "msrvtt.json", tmp_path, part="train", protocol="1kA")
    loaders = {load_vatex: "vatex_training", load_activitynet: "train.json", load_lsmdc: "LSMDC16"}
    for load, name in loaders.items():
        with pytest.raises(FormatError, match=f"expected {name}"):
            load(tmp_path, tmp_path, part="train")


def test_clip_refuses_an_unknown_part(tmp_path):
    clip = make_clips(tmp_path)[0]
    with pytest.raises(ValueError, match="part 'dev'"):
        dataclasses.replace(clip, part="dev")


def test_parts_that_share_a_video_are_refused(tmp_path):
    clips = make_clips(tmp_path)
    train, test = ([clip for clip in clips if clip.part == part] for part in ("train", "test"))
    require_disjoint(train=train, test=test)
    with pytest.raises(ValueError, match=f"clip {train[0].id} of test is also in train"):
        require_disjoint(train=train, test=[*test, train[0]])
    renamed = dataclasses.replace(train[1], id="other", start_s=2.0, end_s=4.0)
    with pytest.raises(ValueError, match=f"clip other of test is also in train .as {train[1].id}"):
        require_disjoint(train=train, test=[renamed])
    early = dataclasses.replace(train[1], id="early", start_s=0.0, end_s=2.0)
    require_disjoint(train=[early], test=[renamed])  # two stretches of one video that do not overlap
