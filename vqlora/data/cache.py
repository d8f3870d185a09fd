"""Decode each video once: all frames of a set of clips in flat uint8 files that are mapped into memory.

A store lies in `<cache>/<key>/`, the key being a hash of what the files contain, so that it is found again
after a move and never after a change. It is built beside its place and renamed there, under a lock: two
processes that want the same store build it once, and a killed one leaves nothing that looks finished.
"""
from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from vqlora.data.clips import Clip, LeftOut
from vqlora.frames.manifest import check_videos
from vqlora.frames.reader import OK, VideoCheck, VideoError, read_frames
from vqlora.frames.workers import Job, run_jobs

CACHE_DIR = Path("build/data/cache")
_VERSION = 1  # of the files' layout
_log = logging.getLogger(__name__)


class CacheError(OSError):
    """The cache cannot be written; the message names the place and what it needs."""


class FrameStore:
    """Decoded frames of clips. `store[i]` and `store[clip_id]` are uint8 `[T, H, W, 3]`, read-only, not
    copied.

    `clips` are the usable ones, in the order given, and `store[i]` belongs to `clips[i]`; `left_out` lists
    the others with the reason. T, H and W may differ from clip to clip, unless `size` makes every frame a
    square of so many pixels; with it, `fps` keeps so many frames a second (`vqlora.data.small`). Cheap to
    pickle: workers map the same files. Raises CacheError when the disk is full. `sounds` is what is heard
    beside the frames, by clip id; there is none until somebody asks for it (`vqlora.sound.store`).
    """

    def __init__(self, clips: Iterable[Clip], cache_dir: Path = CACHE_DIR, *, workers: int | None = None,
                 progress: bool = True, size: int | None = None, fps: float | None = None):
        clips, cache_dir = tuple(clips), Path(cache_dir)
        checks = check_videos((clip.path for clip in clips), cache_dir, workers=workers, progress=progress)
        good, bad = [], {}
        for clip in clips:
            verdict = checks[clip.path].verdict if clip.path in checks else "no such file"
            if verdict == OK:
                good.append(clip)
            else:
                bad[clip.id] = verdict
        if size is None and fps is not None:
            raise ValueError(f"fps: {fps:g} needs a size of frames as well; see `vqlora.data.small`")
        smaller = None if size is None else {"size": size, "fps": fps}
        self.path = cache_dir / _store_key(good, checks, smaller)
        self._index = _open(self.path)
        if self._index is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                self._index = _open(self.path) or _build(self.path, good, checks, workers, progress, smaller)
        bad |= {good[number].id: reason for number, reason in self._index["bad"]}
        self.clips = tuple(clip for clip in clips if clip.id not in bad)
        self.left_out = tuple(LeftOut(str(c.path), c.id, bad[c.id]) for c in clips if c.id in bad)
        self._places = {good[number].id: place for number, place in self._index["places"]}
        self._maps: dict[str, np.ndarray] = {}
        self.sounds: Mapping[str, np.ndarray] = {}
        for row in self.left_out:
            _log.warning("left out: %s", row)

    def __len__(self) -> int:
        return len(self.clips)

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._places

    def __getitem__(self, key: int | str) -> np.ndarray:
        file, offset, shape = self._places[key if isinstance(key, str) else self.clips[key].id]
        if file not in self._maps:
            self._maps[file] = np.memmap(self.path / file, np.uint8, "r")
        return self._maps[file][offset:offset + int(np.prod(shape))].reshape(shape).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a memmap would be pickled frame by frame


class ArrayStore:
    """The same interface over frames in memory, for clips that are drawn and not decoded. Arrays `[T, H, W,
    3]`."""

    def __init__(self, clips: Sequence[Clip], frames: Sequence[np.ndarray]):
        if len(clips) != len(frames):
            raise ValueError(f"{len(clips)} clips, but {len(frames)} arrays of frames")
        self.clips, self.left_out = tuple(clips), ()
        self._frames = {clip.id: array for clip, array in zip(clips, frames, strict=True)}

    def __len__(self) -> int:
        return len(self.clips)

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._frames

    def __getitem__(self, key: int | str) -> np.ndarray:
        return self._frames[key if isinstance(key, str) else self.clips[key].id]


def decode_job(job: Job) -> dict:
    """A worker's job: append a clip's frames to this process's own file in `job["folder"]`."""
    stretch = {"start_s": job["start_s"], "end_s": job["end_s"]}
    known = {"expected": job["frames"], "sha256": job["sha256"], "shown": job["shown"]}
    return append_frames(job, lambda: read_frames(Path(job["path"]), **stretch, **known))


def append_frames(job: Job, read: Callable[[], np.ndarray]) -> dict:
    """Where the frames that `read` gives were appended, or why there are none."""
    try:
        frames = read()
        file = f"frames-{os.getpid()}.bin"
        with open(Path(job["folder"]) / file, "ab") as out:
            offset = out.tell()
            out.write(frames.data)
        return {"place": [file, offset, frames.shape]}
    except VideoError as error:
        return {"bad": error.reason if error.frame is None else f"frame {error.frame}: {error.reason}"}
    except OSError as error:
        return {"errno": error.errno, "strerror": error.strerror}


def _store_key(clips: Sequence[Clip], checks: Mapping[Path, VideoCheck], smaller: Mapping | None) -> str:
    rows = [(checks[clip.path].sha256, clip.start_s, clip.end_s) for clip in clips]
    known = [_VERSION, rows] if smaller is None else [_VERSION, rows, smaller]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _open(path: Path) -> dict[str, Any] | None:
    """The index of a finished store, None if there is none or its files are not as long as they were."""
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        if all((path / file).stat().st_size == size for file, size in index["sizes"].items()):
            return index
    except (OSError, ValueError, KeyError):
        pass
    return None


def _build(path: Path, clips: Sequence[Clip], checks: Mapping[Path, VideoCheck], workers: int | None,
           progress: bool, smaller: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Decode into `<path>.tmp`, then rename. The caller holds the lock."""
    temporary = path.with_name(path.name + ".tmp")
    for leftover in (path, temporary):
        shutil.rmtree(leftover, ignore_errors=True)
    needed_bytes = sum(_clip_bytes(clip, checks[clip.path], smaller) for clip in clips)
    free_bytes = shutil.disk_usage(path.parent).free
    if needed_bytes > free_bytes:
        raise CacheError(f"{path.parent}: decoded frames need {needed_bytes / 1e6:.0f} MB and the disk has "
                         f"{free_bytes / 1e6:.0f} MB free")
    temporary.mkdir()
    places, bad = [], []
    jobs = [{"path": str(clip.path), "start_s": clip.start_s, "end_s": clip.end_s, "folder": str(temporary),
             "frames": checks[clip.path].frames, "sha256": checks[clip.path].sha256,
             "shown": checks[clip.path].shown, **(smaller or {})} for clip in clips]
    # by name: runs whose frames are as large as their videos do not depend on the other way
    job = f"{__name__ if smaller is None else 'vqlora.data.small'}:decode_job"
    try:
        with tqdm(total=len(jobs), desc="decoding videos", unit="clip", mininterval=1,
                  disable=not progress) as bar:
            def each(number: int, result: dict) -> None:
                if "errno" in result:
                    reason = "the disk is full" if result["errno"] == errno.ENOSPC else result["strerror"]
                    need = f"decoded frames need {needed_bytes / 1e6:.0f} MB"
                    raise CacheError(f"{path.parent}: {reason} ({need})")
                if "place" in result:
                    places.append((number, result["place"]))
                else:
                    bad.append((number, result.get("bad") or f"the decoder died of it ({result['died']})"))
                bar.update()

            run_jobs(job, jobs, workers=workers, each=each)
        index = {"version": _VERSION, "places": sorted(places), "bad": sorted(bad),
                 "sizes": {file.name: file.stat().st_size for file in sorted(temporary.glob("frames-*.bin"))}}
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return index


def _clip_bytes(clip: Clip, check: VideoCheck, smaller: Mapping[str, Any] | None = None) -> int:
    share = 1.0
    if clip.end_s is not None and check.duration_s:
        share = min(1.0, (clip.end_s - (clip.start_s or 0.0)) / check.duration_s)
    if smaller is not None:
        share *= min(1.0, (smaller["fps"] or check.fps) / check.fps) if check.fps else 1.0
        return int(check.frames * share) * smaller["size"] ** 2 * 3
    return int(check.frames * share) * check.width * check.height * 3
