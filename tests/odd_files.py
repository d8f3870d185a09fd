"""Small data sets in exactly the published formats, with the oddities that real copies of them have."""

import json
from pathlib import Path

ROWS = [  # of README's table: data set, protocol, part
    ("msrvtt", "official", "train"),
    ("msrvtt", "1k-A", "test"),
    ("vatex", "official", "train"),
    ("activitynet", "official", "val"),
    ("lsmdc", "official", "test"),
    ("jsonl", "official", "train"),
]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def put(root: Path, name: str, value) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = value if isinstance(value, bytes | str) else json.dumps(value)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def msrvtt(root: Path) -> Path:
    """Two JSON files in two folders, lists in a third; video0 to video2 train, 3 val, 5 to 9 test."""

    def video(number, split):
        return {"category": 9, "url": f"https://example.org/{number}", "video_id": f"video{number}",
                "start time": 137.72, "end time": 149.44, "split": split, "id": number}  # fmt: skip

    def said(*rows):
        return [{"caption": text, "video_id": f"video{video}", "sen_id": i} for i, (video, text) in rows]

    info = {"contributor": "owner", "data_created": "2016-04-14", "version": "1.0", "description": "",
            "year": 2016}  # fmt: skip
    learned = said(*enumerate([
        *[(0, "a man is driving")] * 2, (0, " a car\tis shown \n"), (0, ""), (1, None),
        (1, "two women talk"), (2, "a dog runs"), (3, "someone cooks"), (77, "nobody knows"),
    ]))  # fmt: skip
    learned.append({"caption": "again", "video_id": "video0", "sen_id": 0})
    body = {"info": info, "videos": [video(0, "train"), video(1, "train"), video(2, "train"),
                                     video(3, "validate"), video(1, "train"), video(4, "training")],
            "sentences": learned}  # fmt: skip
    marked = b"\xef\xbb\xbf" + json.dumps(body).encode()
    put(root, "train_val_annotation/train_val_videodatainfo.json", marked)
    tested = [(n, f"test clip {n} is shown {how}") for n in range(5, 10) for how in ("once", "twice")]
    tested = said(*enumerate(tested))
    tests = [video(n, "test") for n in range(5, 10)]
    put(root, "test_videodatainfo.json", {"info": info, "videos": tests, "sentences": tested})
    put(root, "msrvtt_data/MSRVTT_JSFUSION_test.csv",
        "\ufeffkey,vid_key,video_id,sentence\r\nret0,msr7,video7,a man, in a car\r\n"
        'ret1,msr8,video8,"a ""red"" car, driving"\r\nret2,msr9,video9,"a dog\r\nret3,msr7,video7,again\r\n'
        "ret4,msr99,video99,no such video\r\n\r\nret5\r\n")  # fmt: skip
    ids = "".join(f"video{n}\n" for n in (0, 1, 2, 3, 5, 6))
    put(root, "msrvtt_data/MSRVTT_train.9k.csv", "video_id\n" + ids)
    put(root, "msrvtt_data/MSRVTT_train.7k.csv",
        "key,vid_key,video_id,sentence\nret0,msr0,video0,not this one\nret1,msr1,video1,nor\n")  # fmt: skip
    touch(root, "TrainValVideo/video0.mp4", "TrainValVideo/video0.webm", "TrainValVideo/video1.MP4",
          "TrainValVideo/video3.avi", *(f"TestVideo/video{n}.mp4" for n in range(5, 10)))  # fmt: skip
    return root


def vatex(root: Path) -> Path:
    """Published lists; most videos are gone, one is whole and one cut."""
    train = [
        {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A person rides.", "A person rides."],
         "chCap": ["一个人在修自行车。", " "]},
        {"videoID": "-whole_one_000003_000013", "enCap": ["Two dogs\nplay.", ""], "chCap": ["两只狗在玩。"]},
        {"videoID": "-whole_one_000013_000003", "enCap": ["Time runs backwards."]},
        {"videoID": "gone_0000000_000000_000010", "enCap": ["It was taken down."]},
        {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["Once more."]},
        {"enCap": ["Whose is this?"]},
    ]  # fmt: skip
    put(root, "vatex_training_v1.0.json", train)
    known = [{"videoID": f"val{n}_0000000_000000_000010", "enCap": [f"Clip {n}."], "chCap": ["片段。"]}
             for n in range(4)]  # fmt: skip
    put(root, "vatex_validation_v1.0.json", known)
    tests = [{"videoID": "test_000000_000010", "enCap": ["A test."]}]
    put(root, "vatex_public_test_english_v1.1.json", tests)
    put(root, "splits/val_list.txt", "\ufeffval0_0000000_000000_000010\r\nval1_0000000_000000_000010\r\n")
    put(root, "splits/test_list.txt", "val2_0000000_000000_000010\nval9_0000000_000000_000010\n"
        "val2_0000000_000000_000010\n")  # fmt: skip
    touch(root, "clips/Ptf_2VRj-V0_000122_000132.mp4", "clips/-whole_one.mkv", "clips/test_000000_000010.mp4",
          *(f"clips/{row['videoID']}.mp4" for row in known))  # fmt: skip
    return root


def activitynet(root: Path) -> Path:
    """captions.zip's files; two writers of validation paragraphs, with bad times."""
    put(root, "captions/train.json", {
        "v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]],
                          "sentences": ["A woman dances.", " She goes on dancing."]}})  # fmt: skip
    put(root, "captions/val_1.json", {
        "v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15], [13.79, 56.4], [54.32, 13.79],
                                                            [60, 70], ["x", 3], [1, 2]],
                          "sentences": ["A man cuts.", " He talks.", "Reversed.", "Late.", "Odd.", "  "]},
        "v_bXdq2zI1Ms0": {"duration": 73.1, "timestamps": [[0, 73.1]], "sentences": ["One.", "Two."]},
        "v_gone0000000": {"duration": 10, "timestamps": [[0, 10]], "sentences": ["It was taken down."]},
        "v_empty000000": []})  # fmt: skip
    put(root, "captions/val_2.json", {
        "v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15]], "sentences": ["Seen again."]}})
    put(root, "captions/val_ids.json", ["v_uqiMw7tQ1Cc", "v_bXdq2zI1Ms0"])
    touch(root, "v1-3/v_QOlSCBRmfWY.mp4", "v1-3/train_val/uqiMw7tQ1Cc.mkv", "v1-3/v_bXdq2zI1Ms0.mp4")
    return root


def lsmdc(root: Path) -> Path:
    """Tab-separated without a header; a folder per film, one film whole."""
    times = "00.07.01.000\t00.07.03.000\t00.07.01.275\t00.07.02.720"
    juno = "1004_Juno_00.07.01.275-00.07.02.720"
    beauty, battle = "0001_American_Beauty_00.00.51.926-00.00.54.129", "3009_BATTLE_00.01.00.000-00.01.02.000"
    put(root, "LSMDC16_annos_training.csv", f"{beauty}\t{times}\tSOMEONE smiles.\n")
    put(root, "LSMDC16_annos_val.csv", f"{battle}\t{times}\tSOMEONE runs.\n")
    lines = [
        f"{juno}\t{times}\tSOMEONE says \"no.\r", *[f"{juno}\t{times}\tShe waves."] * 2,
        f"1012_Unbreakable_00.05.16.065-00.05.21.941\t{times}\tA caf\xe9 opens.", "short\tline", "",
        f"\"3015_CHARLIE_00.10.00.000-00.10.02.500\t{times}\tSOMEONE says \"\"hello\"\".\"",
        f"3015_CHARLIE_01.00.00.000-01.00.02.500\t{times}\tA stray\ttab.", f"{juno}\t{times}\t ",
        f"1099_Lost_00.00.01.000-00.00.03.000\t{times}\tNo file.",
        f"1012_Unbreakable_00.10.00.000-00.09.00.000\t{times}\tBack.",
    ]  # fmt: skip
    put(root, "LSMDC16_annos_test.csv", "\n".join(lines).encode("cp1252") + b"\n")
    put(root, "LSMDC16_challenge_1000_publictect.csv", f"{juno}\t{times}\tSOMEONE says \"no.\n")
    touch(root, f"avi/1004_Juno/{juno}.avi", "films/1012_Unbreakable.mkv", "films/3015_CHARLIE.mp4",
          f"avi/0001_American_Beauty/{beauty}.avi", f"avi/3009_BATTLE/{battle}.avi")  # fmt: skip
    return root


def jsonl(root: Path) -> Path:
    """One's own file, as people write it by hand."""
    rows = [
        {"video": "clips/a.mp4", "captions": ["a dog runs", "a dog runs"], "part": "train"},
        {"video": "clips/a.mp4", "captions": "the dog\tis brown", "part": "train"},
        {"video": "clips/b.mp4", "captions": {"en": ["a cat"], "de": ["eine Katze", ""]}, "part": "train",
         "questions": [{"question": "what is it ?", "answer": "cat", "choices": ["cat", "dog"]},
                       {"question": "and now ?", "answer": "bee", "choices": ["cat", "dog"]}]},
        {"video": "clips/long.mkv", "captions": ["at first"], "start": 0, "end": 2.5, "part": "train"},
        {"video": "clips/long.mkv", "captions": ["and then"], "start": 2.5, "part": "val"},
        {"video": "clips/gone.mp4", "captions": ["not there"], "part": "train"},
        {"video": "clips/a.mp4", "captions": ["in two parts"], "part": "val"},
        {"video": "clips/b.mp4", "caption": ["misspelt"], "part": "train"},
        {"video": "clips/b.mp4", "captions": ["part misspelt"], "part": "training"},
        {"video": "clips/long.mkv", "captions": ["backwards"], "start": 3, "end": 2, "part": "train"},
        {"video": "clips/notes.txt", "captions": ["no video"], "part": "train"},
        {"video": "clips/c.mp4", "captions": [], "part": "train"},
        {"video": 7, "captions": ["no path"]}, {"video": "clips/d.mp4", "captions": ["no part"]}, ["a list"],
    ]  # fmt: skip
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n{\"video\": \"clips/\r\n\r\n"
    put(root, "captions.jsonl", text)
    touch(root, *(f"clips/{name}.mp4" for name in "abcd"), "clips/long.mkv", "clips/notes.txt")
    return root


WRITERS = {"msrvtt": msrvtt, "vatex": vatex, "activitynet": activitynet, "lsmdc": lsmdc, "jsonl": jsonl}


def sheet(root: Path) -> str:
    """README's table: what the loaders say of all of them."""
    from vqlora.data.sheet import data_sheet, markdown
    from vqlora.data.sources import SOURCES, load

    parts = {}
    for name, protocol, part in ROWS:
        folder = root / name
        if not folder.is_dir():
            WRITERS[name](folder)
        parts[f"{SOURCES[name].title}, {protocol}", part] = load(name, folder, part, protocol=protocol)
    return markdown(data_sheet(parts))
