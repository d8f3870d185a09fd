"""Whole data sets in their published form, oddities included: what is read, left out, mended, refused."""

import json
from pathlib import Path

import odd_files
import pytest
from odd_files import WRITERS, put, touch

from vqlora.config import DataSource
from vqlora.data.clips import Question, Segment
from vqlora.data.formats import load_activitynet, load_jsonl, load_lsmdc, load_msrvtt, load_vatex
from vqlora.data.rows import FormatError, Videos
from vqlora.data.sources import SOURCES, load, refuse_overlap

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One folder per format; tests read them only."""
    folder = tmp_path_factory.mktemp("odd")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


def test_readme_shows_what_the_loaders_say_of_the_odd_files(odd):
    assert odd_files.sheet(odd) in (ROOT / "README.md").read_text()


def captions(loaded):
    return {clip.id: clip.captions["en"] for clip in loaded.clips}


def rows(found):
    return {(row.row, row.reason.split(" in /")[0]) for row in found}


# --- MSR-VTT


def test_msrvtt_parts_from_files_in_different_folders(odd):
    train = load("msrvtt", odd / "msrvtt", "train")
    assert captions(train) == {
        "video0": ("a man is driving", "a man is driving", "a car is shown"),
        "video1": ("two women talk",),
    }
    assert [clip.path.name for clip in train.clips] == ["video0.mp4", "video1.MP4"] and train.read == 8
    assert all(clip.start_s is None for clip in train.clips)
    assert rows(train.noted) == {
        ("video0", "several video files: the first of .mp4, .webm"),
        ("video0 caption 1", "repeats a caption; both are kept"),
        ("sentence 2", "tab or line break in a text; a blank stands for it"),
    }
    assert ("video2", "no video file: video2") in rows(train.left_out)
    parts = {part: captions(load("msrvtt", odd / "msrvtt", part)) for part in ("val", "test")}
    assert list(parts["val"]) == ["video3"] and list(parts["test"]) == [f"video{n}" for n in range(5, 10)]


def test_msrvtt_lists_with_stray_quotes_unquoted_commas_and_a_byte_order_mark(odd):
    test = load("msrvtt", odd / "msrvtt", "test", protocol="1k-A")
    assert captions(test) == {
        "video7": ("a man, in a car",),
        "video8": ('a "red" car, driving',),
        "video9": ("a dog",),
    }
    assert rows(test.noted) == {("line 2", "separator in an unquoted sentence"), ("line 4", "stray quote")}
    assert {
        ("video99", "no such video: 'video99' is not in the annotations"),
        ("line 5", "video listed twice"),
        ("line 8", "no video_id"),
    } <= rows(test.left_out)
    nine, seven = (load("msrvtt", odd / "msrvtt", "train", protocol=p) for p in ("1k-A", "1k-A-7k"))
    assert list(captions(nine)) == ["video0", "video1", "video3", "video5", "video6"]
    assert captions(seven) == captions(
        load("msrvtt", odd / "msrvtt", "train")
    )  # not the sentences of the list


def test_a_run_that_trains_on_clips_of_another_protocols_test_part_is_refused(odd):
    data = DataSource(format="msrvtt", root=str(odd / "msrvtt"), protocol="1k-A")
    refuse_overlap(data, "test")
    with pytest.raises(
        ValueError,
        match=r"clip video5 of test \(official\) is also in train \(1k-A\).*: not "
        r"disjoint, 2 clips are shared",
    ):
        refuse_overlap(data.model_copy(update={"eval_protocol": "official"}), "test")
    with pytest.raises(ValueError, match=r"clip video3 of val \(official\) is also in train"):
        refuse_overlap(data.model_copy(update={"eval_protocol": "official"}), "val")


def test_msrvtt_lists_that_share_a_clip_are_refused(tmp_path):
    folder = odd_files.msrvtt(tmp_path) / "msrvtt_data"
    put(folder, "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo7\n")
    with pytest.raises(
        FormatError, match="MSRVTT_train.9k.csv: video7 is in part 'test' too|video7 is in part"
    ):
        load("msrvtt", tmp_path, "train", protocol="1k-A")


# --- VATEX


def test_vatex_missing_videos_whole_ones_and_two_languages(odd):
    train = load("vatex", odd / "vatex", "train")
    assert [(clip.path.name, clip.start_s, clip.end_s, dict(clip.captions)) for clip in train.clips] == [
        (
            "Ptf_2VRj-V0_000122_000132.mp4",
            None,
            None,
            {"en": ("A person rides.", "A person rides."), "zh": ("一个人在修自行车。",)},
        ),
        ("-whole_one.mkv", 3.0, 13.0, {"en": ("Two dogs play.",), "zh": ("两只狗在玩。",)}),
    ]
    assert {row.kind for row in train.left_out} == {
        "empty caption",
        "no video file",
        "ends before it starts",
        "listed twice",
        "no videoID",
    }
    assert "zh" not in load("vatex", odd / "vatex", "test").clips[0].captions


def test_vatex_retrieval_parts_are_lists_of_validation_clips(odd):
    val, test = (load("vatex", odd / "vatex", part, protocol="retrieval") for part in ("val", "test"))
    assert [clip.id[:4] for clip in val.clips] == ["val0", "val1"] and not val.left_out
    assert [clip.id[:4] for clip in test.clips] == ["val2"] and test.read == 2
    assert rows(test.left_out) == {
        (
            "val9_0000000_000000_000010",
            "no such video: 'val9_0000000_000000_000010' is not in the annotations",
        )
    }
    assert rows(test.noted) == {("row 2", "id listed twice")}


@pytest.mark.parametrize(
    "name, text",
    [
        ("ids.json", '["val1_0000000_000000_000010"]'),
        ("ids.csv", "x;video_id\n1;val1_0000000_000000_000010\n"),
        ("ids.txt", "val1_0000000_000000_000010\r\n\r\n"),
    ],
)
def test_a_list_of_ids_may_be_json_csv_or_plain_text(odd, tmp_path, name, text):
    found = load_vatex(odd / "vatex", odd / "vatex", part="val", ids=put(tmp_path, name, text))
    assert [clip.id[:4] for clip in found.clips] == ["val1"] and found.read == 2


# --- ActivityNet Captions


def test_activitynet_paragraphs_of_two_writers(odd):
    val = load("activitynet", odd / "activitynet", "val")
    (clip,) = val.clips
    assert clip.captions == {"en": ("A man cuts. He talks.", "Seen again.")} and clip.start_s is None
    assert clip.segments == (
        Segment(0.28, 55.15, "A man cuts."),
        Segment(13.79, 55.15, "He talks."),
        Segment(0.28, 55.15, "Seen again."),
    )
    assert rows(val.noted) == {("v_uqiMw7tQ1Cc segment 1", "ends past the video's end; cut to it")}
    assert {"times outside the video", "texts without times", "no video file", "empty caption"} <= {
        row.kind for row in val.left_out
    }
    (test,) = load("activitynet", odd / "activitynet", "test", protocol="retrieval").clips
    assert test.part == "test" and test.captions == {"en": ("A man cuts. He talks.",)}  # val_1 alone


def test_activitynet_segments_as_clips(odd):
    val = load("activitynet", odd / "activitynet", "val", task="segments")
    assert [(c.id, c.path.name, c.start_s, c.end_s, c.captions["en"]) for c in val.clips] == [
        ("v_uqiMw7tQ1Cc#0", "uqiMw7tQ1Cc.mkv", 0.28, 55.15, ("A man cuts.",)),
        ("v_uqiMw7tQ1Cc#1", "uqiMw7tQ1Cc.mkv", 13.79, 55.15, ("He talks.",)),
        ("v_uqiMw7tQ1Cc#6", "uqiMw7tQ1Cc.mkv", 0.28, 55.15, ("Seen again.",)),
    ]
    with pytest.raises(FormatError, match="task 'segment' is not one of paragraph, segments"):
        load("activitynet", odd / "activitynet", "val", task="segment")


# --- LSMDC


def test_lsmdc_quotes_tabs_old_bytes_and_films(odd):
    test = load("lsmdc", odd / "lsmdc", "test")
    assert [(c.path.name, c.start_s, c.captions["en"]) for c in test.clips] == [
        ("1004_Juno_00.07.01.275-00.07.02.720.avi", None, ('SOMEONE says "no.', "She waves.", "She waves.")),
        ("1012_Unbreakable.mkv", 316.065, ("A café opens.",)),
        ("3015_CHARLIE.mp4", 600.0, ('SOMEONE says "hello".',)),
        ("3015_CHARLIE.mp4", 3600.0, ("A stray tab.",)),
    ]
    assert rows(test.noted) == {
        ("line 4", "not UTF-8; read as Windows-1252"),
        ("line 7", "quotes around the line removed"),
        ("line 8", "tab in the sentence"),
        ("1004_Juno_00.07.01.275-00.07.02.720 caption 2", "repeats a caption; both are kept"),
    }
    assert [row.kind for row in test.left_out] == [
        "wrong columns",
        "empty caption",
        "no video file",
        "ends before it starts",
    ]
    assert captions(load("lsmdc", odd / "lsmdc", "test", protocol="1k")) == {
        "1004_Juno_00.07.01.275-00.07.02.720": ('SOMEONE says "no.',)
    }


# --- one's own


def test_jsonl_lines_add_up_and_each_bad_one_says_why(odd):
    train = load("jsonl", odd / "jsonl", "train")
    assert captions(train) == {
        "clips/a.mp4": ("a dog runs", "a dog runs", "the dog is brown"),
        "clips/b.mp4": ("a cat",),
        "clips/long.mkv#0-2.5": ("at first",),
    }
    assert train.clips[1].captions["de"] == ("eine Katze",)
    assert train.clips[1].questions == (Question("what", "what is it ?", ("cat", "dog"), 0),)
    assert (train.clips[2].start_s, train.clips[2].end_s) == (0.0, 2.5)
    (late,) = load("jsonl", odd / "jsonl" / "captions.jsonl", "val").clips
    assert (late.id, late.start_s, late.end_s) == ("clips/long.mkv#2.5-inf", 2.5, None)
    reasons = {row.row: row.reason for row in train.left_out}
    assert reasons == {
        "line 3": "empty caption",
        "line 3 question 1": "the answer is not among the choices, or two choices are alike",
        "line 6": "no video file: clips/gone.mp4",
        "line 7": "two parts: 'val', but 'train' on line 1",
        "line 8": "unknown key: 'caption'; allowed: video, captions, questions, part, start, end",
        "line 9": "unknown part: 'training' is not one of train, val, devtest, test",
        "line 10": "ends before it starts: 2 s, 3 s",
        "line 11": "no video ending: '.txt' is not one of .mp4 .mkv .webm .avi .mov .m4v .mpg .gif",
        "line 12": "no caption and no question",
        "line 13": "no path: video is 7",
        "line 14": "no part: other lines have one",
        "line 15": "no object: holds a list",
        "line 16": reasons["line 16"],
    }
    assert reasons["line 16"].startswith("broken JSON: column")


def test_jsonl_without_parts_is_split_by_the_videos_name(tmp_path):
    names = [f"v{n}.mp4" for n in range(60)]
    touch(tmp_path, *names)
    lines = [json.dumps({"video": name, "captions": [text]}) for name in names for text in ("one", "two")]
    put(tmp_path, "captions.jsonl", "\n".join(lines))
    parts = {part: load("jsonl", tmp_path, part).clips for part in ("train", "val")}
    assert sorted(clip.id for clips in parts.values() for clip in clips) == sorted(names)
    assert 4 <= len(parts["val"]) <= 22 and all(
        clip.captions["en"] == ("one", "two") for clip in parts["val"]
    )
    put(tmp_path, "captions.jsonl", "\n".join(reversed(lines[:100])))
    assert {clip.id for clip in load("jsonl", tmp_path, "val").clips} == {
        clip.id for clip in parts["val"]
    } & set(names[:50])  # clips that come or go move no other


# --- files that cannot be used at all


@pytest.mark.parametrize(
    "format, file, text, wanted",
    [
        ("msrvtt", "MSRVTT_data.json", '{"videos": [}', "MSRVTT_data.json: broken JSON at line 1 column 13"),
        ("msrvtt", "MSRVTT_data.json", '{"videos": []}', "MSRVTT_data.json: no list 'sentences'"),
        ("vatex", "vatex_training_v1.0.json", "{}", "vatex_training_v1.0.json: holds a dict"),
        ("vatex", "vatex_training_v1.0.json", "[]", "vatex_training_v1.0.json: no clips of part 'train'"),
        ("activitynet", "train.json", b"\xff\xfe{", "train.json: not UTF-8 at byte 0"),
        (
            "lsmdc",
            "LSMDC16_annos_training.csv",
            "a,b,c,d,e,f\n",
            "LSMDC16_annos_training.csv: line 1: 1 columns: 'a,b,c,d,e,f'",
        ),
        (
            "jsonl",
            "captions.jsonl",
            "[\n",
            "captions.jsonl: line 1: broken JSON: column 2 (Expecting value): '['",
        ),
        ("jsonl", "captions.jsonl", "\n", "captions.jsonl: is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_row_and_value(tmp_path, format, file, text, wanted):
    put(tmp_path, file, text)
    with pytest.raises(FormatError) as caught:
        load(format, tmp_path, "train")
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_without_ids_or_the_column_is_named(tmp_path):
    odd_files.msrvtt(tmp_path)
    put(tmp_path, "msrvtt_data/MSRVTT_JSFUSION_test.csv", "key,video\nret0,video7\n")
    with pytest.raises(FormatError, match="line 1: no column 'video_id' in the header 'key,video'"):
        load("msrvtt", tmp_path, "test", protocol="1k-A")
    with pytest.raises(FormatError, match="ids.txt: no ids"):
        load_vatex(tmp_path, tmp_path, part="val", ids=put(tmp_path, "ids.txt", "\n"))


@pytest.mark.parametrize(
    "asked, wanted",
    [
        (("msrvt", "train", {}), "format: 'msrvt' is not one of msrvtt, vatex"),
        (
            ("msrvtt", "train", {"protocol": "1kA"}),
            "protocol: '1kA' is not one of official, 1k-A, 1k-A-7k of msrvtt",
        ),
        (("msrvtt", "val", {"protocol": "1k-A"}), "no part 'val'; allowed: train, test"),
        (
            ("lsmdc", "train", {}),
            "part train: no LSMDC16_annos_training.csv in it or below it; `vqlora data check",
        ),
        (
            ("msrvtt", "train", {"protocol": "1k-A"}),
            "no MSRVTT_data.json or train_val_videodatainfo.json with test_videodatainfo.json in it",
        ),
    ],
)
def test_what_is_missing_or_misspelt_is_named_with_what_is_allowed(tmp_path, asked, wanted):
    format, part, more = asked
    with pytest.raises(FormatError) as caught:
        load(format, tmp_path, part, **more)
    assert wanted in str(caught.value)


def test_annotations_given_as_files_and_videos_behind_links(odd, tmp_path):
    (tmp_path / "linked").symlink_to(odd / "activitynet" / "v1-3")
    (tmp_path / "back").symlink_to(tmp_path)
    assert len(Videos(tmp_path)) == 3
    files = [odd / "activitynet" / "captions" / name for name in ("val_1.json", "val_2.json")]
    assert len(load_activitynet(files, tmp_path, part="val").clips) == 1
    assert len(load_lsmdc([odd / "lsmdc" / "LSMDC16_annos_val.csv"], odd / "lsmdc", part="val").clips) == 1
    both = [
        next((odd / "msrvtt").rglob(name))
        for name in ("train_val_videodatainfo.json", "test_videodatainfo.json")
    ]
    assert len(load_msrvtt(both, odd / "msrvtt", part="test").clips) == 5
    assert len(load_jsonl(odd / "jsonl", part="train").clips) == 3


def places(value, at=()):
    """The place of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield at
    for key, one in inner:
        yield from places(one, (*at, key))


def spoiled(value, at, junk):
    if not at:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = spoiled(value[at[0]], at[1:], junk)
    return copy


@pytest.mark.parametrize(
    "format, file, part",
    [
        ("msrvtt", "train_val_annotation/train_val_videodatainfo.json", "train"),
        ("vatex", "vatex_training_v1.0.json", "train"),
        ("activitynet", "captions/val_1.json", "val"),
        ("jsonl", "captions.jsonl", "train"),
    ],
)
def test_any_value_replaced_by_junk_costs_rows_or_is_named(tmp_path, format, file, part):
    path = WRITERS[format](tmp_path) / file
    text = path.read_text(encoding="utf-8-sig")
    lines = format == "jsonl"
    value = [json.loads(line) for line in text.split("\n")[:-3]] if lines else json.loads(text)
    seen = set()
    for at in [at for at in places(value) if at or not lines]:
        for junk in (None, -1, "\0", [], {"a": [1]}):
            bad = spoiled(value, at, junk)
            path.write_text("\n".join(map(json.dumps, bad)) if lines else json.dumps(bad))
            try:
                found = load(format, tmp_path, part)
                seen |= {row.kind for row in found.left_out}
                assert all(text for clip in found.clips for text in clip.captions.values())
            except FormatError as fault:
                assert file.split("/")[-1] in str(fault) or "no part" in str(fault)
    assert len(seen) >= 5


def test_every_format_has_a_loader_and_protocols(odd):
    assert set(SOURCES) == set(WRITERS)
    for format, source in SOURCES.items():
        for protocol, parts in source.protocols.items():
            for part in parts:
                assert load(format, odd / format, part, protocol=protocol).clips, (format, protocol, part)
