"""Damage many video files and count what the reader makes of them. Not run by pytest; run it by hand:

    python tests/fuzz_reader.py -n 200 --seed 0

Small videos of several codecs and containers are damaged one at a time (bytes overwritten, bits flipped, cut
short, a stretch removed, repeated or zeroed, garbage at the head), and each reading has a process of its own:

- nothing: nothing is known of the file; `read_frames` as it is
- sha256: known before the damage, from a manifest or a SHA256SUMS file; all that a data set is read by
- decord: what decord alone makes of it, where it is installed, for comparison

Outcomes: `error` (a clean VideoError that names the file), `harmless` (all frames as before the damage),
`SILENT` (frames given that are wrong or too few), `HANG` (longer than the limit), `CRASH` (the process died
or another exception escaped). The exit code is 1 where a file known by its `sha256` is silently wrong, or
where any reading of ours hangs or crashes. `--csv` keeps the counts by codec, container and kind of damage.
"""
import argparse
import collections
import csv
import hashlib
import json
import math
import os
import resource
import select
import signal
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
    "vp8.webm": ("webm", "libvpx", {}),
    "vp8.ogv": ("ogv", "libvpx", {}),
    "av1.mp4": ("mp4", "libsvtav1", {}),
    "mpeg4.avi": ("avi", "mpeg4", {}),
    "mpeg4.mp4": ("mp4", "mpeg4", {}),
    "mpeg2.mpg": ("mpg", "mpeg2video", {}),
    "ffv1.mkv": ("mkv", "ffv1", {}),
}
KINDS = ("overwrite", "flip", "cut", "remove", "repeat", "zero", "head")
OUTCOMES = ("error", "harmless", "SILENT", "HANG", "CRASH")
HEIGHT, WIDTH = 144, 176  # several rows of the largest blocks
Counts = dict[tuple[str, ...], collections.Counter]


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


class Server:
    """A process that has imported all and opened nothing; each reading is a fork of it."""

    def __init__(self, limit_s: float):
        code = f"import sys; sys.path[:0] = {sys.path[:2]!r}; import fuzz_reader as f; f.serve({limit_s})"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         env=os.environ | {"OMP_NUM_THREADS": "1"})

    def attempt(self, job: dict) -> tuple[str, float]:
        """(outcome, CPU seconds) of one reading."""
        print(json.dumps(job), file=self._process.stdin, flush=True)
        outcome, cpu_s = self._process.stdout.readline().split()
        return outcome, float(cpu_s)

    def close(self) -> None:
        self._process.communicate()


def serve(limit_s: float) -> None:
    """Answers each line of standard input."""
    import importlib.util

    import vqlora.frames.reader as reader
    if importlib.util.find_spec("decord"):
        reader._decord()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what decoders print is no answer
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        outcome = forked(json.loads(line), limit_s)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(outcome, f"{cpu_s:.3f}", file=answers, flush=True)


def forked(job: dict, limit_s: float) -> str:
    """The outcome of a reading that may take `limit_s` of CPU time, and thirty times that of the clock's
    (the machine may be busy)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s)))
        os.write(theirs, read(job).encode())
        os._exit(0)
    os.close(theirs)
    readable, _, _ = select.select([ours], [], [], 30 * limit_s)
    said = os.read(ours, 99).decode() if readable else ""
    os.close(ours)
    if not readable:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not readable or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "HANG"
    return said if said in OUTCOMES else "CRASH"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=100, help="damaged files (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, metavar="S", help="CPU seconds a reading (2)")
    parser.add_argument("--decord", action="store_true", help="also read with decord alone")
    parser.add_argument("--csv", metavar="FILE", help="write all counts there")
    chosen = parser.parse_args()

    import av
    from little_videos import encode

    from vqlora.frames.reader import read_frames
    av.logging.set_level(av.logging.PANIC)
    counts: Counts = collections.defaultdict(collections.Counter)
    started = time.monotonic()
    slowest_s, server = 0.0, Server(chosen.limit)
    with tempfile.TemporaryDirectory() as folder:
        whole, truth = {}, {}
        for name, (suffix, codec, options) in SOURCES.items():
            path = encode(Path(folder) / f"source-{name}.{suffix}", 24, codec=codec, height=HEIGHT,
                          width=WIDTH, noise=60, **options)
            frames = read_frames(path)
            whole[name] = path.read_bytes()
            truth[name] = {"shape": list(frames.shape), "frames": hashlib.sha256(frames).hexdigest(),
                           "sha256": hashlib.sha256(whole[name]).hexdigest()}
        for number in range(chosen.n):
            rng = np.random.default_rng([chosen.seed, number])
            name, kind = list(SOURCES)[number % len(SOURCES)], KINDS[number // len(SOURCES) % len(KINDS)]
            path = Path(folder) / f"{number}-{name}"
            path.write_bytes(damaged(whole[name], kind, rng))
            hows = {"nothing": {}, "sha256": {"sha256": truth[name]["sha256"]}}
            if chosen.decord:
                hows["decord"] = {"backend": "decord"}
            for how, arguments in hows.items():
                outcome, cpu_s = server.attempt(truth[name] | {"path": str(path), "how": arguments})
                slowest_s = max(slowest_s, cpu_s)
                counts[how, name, kind][outcome] += 1
            path.unlink()
    server.close()
    print(f"{chosen.n} damaged files, seed {chosen.seed}, {time.monotonic() - started:.0f} s; "
          f"the slowest reading took {slowest_s:.2f} CPU-s")
    for (how, group), row in sorted(grouped(counts).items()):
        print(f"{how:8} {group:28}", "  ".join(f"{outcome} {row[outcome]:4}" for outcome in OUTCOMES))
    if chosen.csv:
        write_counts(Path(chosen.csv), counts)
    ours = [grouped(counts)[how, "all"] for how in ("nothing", "sha256")]
    return int(ours[1]["SILENT"] > 0 or any(row["HANG"] + row["CRASH"] for row in ours))


def grouped(counts: Counts) -> Counts:
    """(what was known, "all" or one source or kind of damage) -> outcomes."""
    groups: Counts = collections.defaultdict(collections.Counter)
    for (how, name, kind), row in counts.items():
        for group in ("all", f"source {name}", f"damage {kind}"):
            groups[how, group] += row
    return groups


def write_counts(path: Path, counts: Counts) -> None:
    """One row for each source, kind of damage and what was known."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["known", "source", "codec", "container", "damage", *(o.lower() for o in OUTCOMES)])
        for (how, name, kind), row in sorted(counts.items()):
            suffix, codec, _ = SOURCES[name]
            rows.writerow([how, name, codec, suffix, kind, *(row[outcome] for outcome in OUTCOMES)])


if __name__ == "__main__":
    sys.exit(main())
