"""What is known of video files: hash, length, and whether every frame decodes. Found out once, then trusted.

A manifest is one JSON file per folder of videos, kept in the cache, not beside the videos (which may be
read-only). An entry is trusted while the file's size and modification time are the same, and a reader that is
given its sha256 refuses a file that has other bytes nevertheless. So damage after the check cannot pass.
Damage before it can, where it breaks no rule of the format (measured in `tests/fuzz_reader.py`: a few files
in a hundred, most of them H.264 and MPEG-4), unless the folder has a `SHA256SUMS`, whose hashes are then
required.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from vqlora.files import write_atomic
from vqlora.frames.reader import VideoCheck, check
from vqlora.frames.sums import read_sums
from vqlora.frames.workers import Job, run_jobs

_VERSION = 4  # of the check: a stricter one must look at every file again


def check_videos(paths: Iterable[Path], cache_dir: Path, *, workers: int | None = None,
                 progress: bool = True) -> dict[Path, VideoCheck]:
    """The check of every path that exists, from the manifest or done now in parallel; missing files are
    absent."""
    stamps: dict[Path, tuple[int, int]] = {}
    for path in dict.fromkeys(map(Path, paths)):
        try:
            stat = os.stat(path)
        except OSError:
            continue
        stamps[path] = (stat.st_size, stat.st_mtime_ns)
    folders: dict[Path, list[Path]] = {}
    for path in stamps:
        folders.setdefault(Path(os.path.abspath(path.parent)), []).append(path)
    known: dict[Path, VideoCheck] = {}
    sums: dict[Path, str | None] = {}
    for folder, group in folders.items():
        entries, listed = _read(_file(cache_dir, folder)), read_sums(folder)
        for path in group:
            entry, sums[path] = entries.get(path.name), listed.get(path.name)
            if entry and tuple(entry["stamp"]) == stamps[path]:
                check = VideoCheck(**entry["check"])
                if check.sha256 == sums[path] or sums[path] is None and not entry["listed"]:
                    known[path] = check
    todo = {path: sums[path] for path in stamps if path not in known}
    if not todo:
        return known
    fresh = _check_all(todo, workers, progress)
    for folder, group in folders.items():
        new = {path.name: {"stamp": stamps[path], "check": asdict(fresh[path]),
                           "listed": sums[path] is not None}
               for path in group if path in fresh and fresh[path].sha256}  # a killed worker proves nothing
        if new:
            file = _file(cache_dir, folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                body = {"version": _VERSION, "folder": str(folder), "files": _read(file) | new}
                write_atomic(file, json.dumps(body, ensure_ascii=False))
    return known | fresh


def check_job(job: Job) -> dict:
    """A worker's job: {"path", "sha256" or None} -> the fields of VideoCheck."""
    return asdict(check(Path(job["path"]), job["sha256"]))


def _check_all(todo: dict[Path, str | None], workers: int | None,
               progress: bool) -> dict[Path, VideoCheck]:
    found: dict[Path, VideoCheck] = {}
    paths = list(todo)
    with tqdm(total=len(paths), desc="checking videos", unit="file", mininterval=1,
              disable=not progress) as bar:
        def each(index: int, result: dict) -> None:
            died = result.get("died")
            verdict = VideoCheck("", 0, 0, 0, 0.0, 0.0, f"the decoder died of it (exit code {died})")
            found[paths[index]] = verdict if died is not None else VideoCheck(**result)
            bar.update()

        jobs = [{"path": str(path), "sha256": sha256} for path, sha256 in todo.items()]
        run_jobs(f"{__name__}:check_job", jobs, workers=workers, each=each)
    return found


def _file(cache_dir: Path, folder: Path) -> Path:
    return Path(cache_dir) / "manifests" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> dict[str, dict]:
    """The entries of a manifest file; none when it is missing, of another version or damaged."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        return body["files"] if body["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
