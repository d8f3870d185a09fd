"""Damage many video files and count what the reader makes of them. Not run by pytest; run it by hand:

    python tests/fuzz_reader.py -n 200 --seed 0

Small videos of several codecs and containers are damaged one at a time (bytes overwritten, bits flipped, cut
short, a stretch removed, repeated or zeroed, garbage at the head), and each reading has a process of its own:

- new: nothing is known of the file; `read_frames` as it is
- listed: its sha256 was known before the damage, from a manifest or a SHA256SUMS file
- decord: what decord alone makes of it, where it is installed, for comparison

Outcomes: `error` (a clean VideoError that names the file), `harmless` (all frames as before the damage),
`SILENT` (frames given that are wrong or too few), `HANG` (longer than the limit), `CRASH` (the process died
or another exception escaped). The exit code is 1 where `listed` has anything but errors and harmless
files, or where any reading of ours hangs or crashes.
"""
import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

SOURCES = {  # name -> (suffix, codec, encoder options)
    "h264.mp4": ("mp4", "libx264", {}),
    "h264-open-group.mp4": ("mp4", "libx264", {"g": 8, "bf": 3, "x264_params": "open-gop=1"}),
    "h264-cavlc.mp4": ("mp4", "libx264", {"x264_params": "cabac=0"}),
    "h264.mkv": ("mkv", "libx264", {}),
    "h264.ts": ("ts", "libx264", {}),
    "h264.flv": ("flv", "libx264", {}),
    "hevc.mp4": ("mp4", "libx265", {}),
    "vp9.webm": ("webm", "libvpx-vp9", {}),
    "vp8.ogv": ("ogv", "libvpx", {}),
    "av1.mp4": ("mp4", "libsvtav1", {}),
    "mpeg4.avi": ("avi", "mpeg4", {}),
    "mpeg4.mp4": ("mp4", "mpeg4", {}),
    "mpeg2.mpg": ("mpg", "mpeg2video", {}),
    "ffv1.mkv": ("mkv", "ffv1", {}),
}
KINDS = ("overwrite", "flip", "cut", "remove", "repeat", "zero", "head")
OUTCOMES = ("error", "harmless", "SILENT", "HANG", "CRASH")


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A damaged copy that differs from `data`."""
    size, length = len(data), int(2 ** rng.uniform(0, 8))
    place = int(rng.integers(0, size - length))
    before, piece, after = data[:place], data[place:place + length], data[place + length:]
    spoilt = {
        "overwrite": lambda: before + rng.bytes(length) + after,
        "flip": lambda: before + bytes([piece[0] ^ 1 << int(rng.integers(8))]) + piece[1:] + after,
        "cut": lambda: data[:place],
        "remove": lambda: before + after,
        "repeat": lambda: before + piece + piece + after,
        "zero": lambda: before + bytes(length) + after,
        "head": lambda: rng.bytes(length) + data[length:],
    }[kind]()
    return spoilt if spoilt != data else damaged(data, kind, rng)


def read(job: dict) -> str:
    """In the process of its own: an outcome, judged by the hash of all frames of the whole file."""
    from vqlora.frames.reader import VideoError, read_frames
    try:
        frames = read_frames(Path(job["path"]), **job["how"])
    except VideoError as error:
        return "error" if str(error.path) in str(error) and "\n" not in str(error) else "CRASH"
    same = list(frames.shape) == job["shape"] and hashlib.sha256(frames).hexdigest() == job["frames"]
    return "harmless" if same else "SILENT"


def attempt(job: dict, limit_s: float) -> str:
    """Fork-free: a fresh interpreter that imports first and is timed from when it says so."""
    code = f"import sys; sys.path[:0] = {sys.path[:2]!r}; import fuzz_reader; fuzz_reader.child()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        process.stdout.readline()  # its imports are done
        try:
            out, _ = process.communicate(json.dumps(job), timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return "HANG"
    return out.strip() if out.strip() in OUTCOMES else "CRASH"


def child() -> None:
    import vqlora.frames.reader  # noqa: F401
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what decoders print is no answer
    print("ready", file=answers, flush=True)
    print(read(json.load(sys.stdin)), file=answers, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=100, help="damaged files (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, metavar="S", help="seconds for one reading (2)")
    parser.add_argument("--decord", action="store_true", help="also read with decord alone")
    parser.add_argument("--json", metavar="FILE", help="write all counts there")
    chosen = parser.parse_args()

    import av
    from little_videos import encode

    from vqlora.frames.reader import read_frames
    av.logging.set_level(av.logging.PANIC)
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, truth = {}, {}
        for name, (suffix, codec, options) in SOURCES.items():
            path = encode(Path(folder) / f"source-{name}.{suffix}", 24, codec=codec, height=64, width=96,
                          noise=60, **options)
            frames = read_frames(path)
            whole[name] = path.read_bytes()
            truth[name] = {"shape": list(frames.shape), "frames": hashlib.sha256(frames).hexdigest(),
                           "sha256": hashlib.sha256(whole[name]).hexdigest()}
        for number in range(chosen.n):
            rng = np.random.default_rng([chosen.seed, number])
            name, kind = list(SOURCES)[number % len(SOURCES)], KINDS[number // len(SOURCES) % len(KINDS)]
            path = Path(folder) / f"{number}-{name}"
            path.write_bytes(damaged(whole[name], kind, rng))
            hows = {"new": {}, "listed": {"sha256": truth[name]["sha256"]}}
            if chosen.decord:
                hows["decord"] = {"backend": "decord"}
            for how, arguments in hows.items():
                outcome = attempt(truth[name] | {"path": str(path), "how": arguments}, chosen.limit)
                for group in ("all", f"source {name}", f"damage {kind}"):
                    counts[how, group][outcome] += 1
            path.unlink()
    print(f"{chosen.n} damaged files, seed {chosen.seed}, {time.monotonic() - started:.0f} s")
    for (how, group), row in sorted(counts.items()):
        print(f"{how:8} {group:28}", "  ".join(f"{outcome} {row[outcome]:4}" for outcome in OUTCOMES))
    if chosen.json:
        rows = [{"how": how, "group": group} | {outcome: row[outcome] for outcome in OUTCOMES}
                for (how, group), row in counts.items()]
        Path(chosen.json).write_text(json.dumps(rows, indent=1))
    ours = [counts[how, "all"] for how in ("new", "listed")]
    return int(ours[1]["SILENT"] > 0 or any(row["HANG"] + row["CRASH"] for row in ours))


if __name__ == "__main__":
    sys.exit(main())
