"""The data sheet of Kinemoji: what its files hold when read back, samples to look at, and checks.

The checks: no leak from target domains into the source, no video twice, questions not to be guessed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ...frames.manifest import check_videos
from ...frames.reader import OK, read_frames
from ...frames.select import uniform
from ..clips import PARTS, Clip, Loaded
from .domains import DOMAINS, target_only_pair
from .guess import text_only_guess
from .language import captions, parse, sentence_tokens, text_only
from .lexicon import LANGUAGES
from .questions import questions
from .scenes import sample_scene
from .sprites import SPRITES


def statistics(parts: Mapping[tuple[str, str], Loaded], cache_dir: Path, *, workers: int | None = None,
               progress: bool = True) -> pd.DataFrame:
    """One row per (domain, part) of loaded clips, whose videos are decoded once to count their frames.

    Columns: clips, clips_left_out (by the loader or because the video is bad), frames, duration_s, events,
    captions, questions, questions_<kind> (all in total), languages, caption_words_mean, vocabulary (distinct
    English words), caption_unique_frac (clips that share their first caption with no other of the part).
    """
    paths = [clip.path for loaded in parts.values() for clip in loaded.clips]
    checks = check_videos(paths, cache_dir, workers=workers, progress=progress)
    rows = []
    for (domain, part), loaded in parts.items():
        clips = [clip for clip in loaded.clips if clip.path in checks and checks[clip.path].verdict == OK]
        bad = len(loaded.clips) - len(clips)
        kinds = Counter(q.kind for clip in clips for q in clip.questions)
        texts = [text for clip in clips for text in clip.captions["en"]]
        words = [sentence_tokens(text) for text in texts]
        firsts = Counter(clip.captions["en"][0] for clip in clips)
        rows.append({
            "domain": domain, "part": part, "clips": len(clips), "clips_left_out": len(loaded.left_out) + bad,
            "frames": sum(checks[clip.path].frames for clip in clips),
            "duration_s": sum(checks[clip.path].duration_s for clip in clips),
            "events": sum(len(clip.events or ()) for clip in clips),
            "captions": sum(len(texts) for clip in clips for texts in clip.captions.values()),
            "languages": len({language for clip in clips for language in clip.captions}),
            "questions": sum(kinds.values()),
            "caption_words_mean": float(np.mean([len(w) for w in words])) if words else 0.0,
            "vocabulary": len({word for w in words for word in w}),
            "caption_unique_frac": sum(n == 1 for n in firsts.values()) / max(1, len(clips)),
            **{f"questions_{kind}": count for kind, count in sorted(kinds.items())},
        })
    table = pd.DataFrame(rows)
    kinds = sorted(c for c in table if c.startswith("questions_"))
    return table[[c for c in table if c not in kinds] + kinds].fillna({kind: 0 for kind in kinds}).astype(
        {kind: int for kind in kinds}
    )


def by_domain(table: pd.DataFrame) -> pd.DataFrame:
    """`statistics` with one row per domain: <part>_clips, and frames, duration_s, events, captions, questions
    per clip."""
    rows = []
    for domain, group in table.groupby("domain", sort=False):
        clips = max(1, int(group["clips"].sum()))
        counts = group.set_index("part")["clips"]
        rows.append({
            "domain": domain, **{f"{part}_clips": int(counts.get(part, 0)) for part in PARTS},
            "frames": round(group["frames"].sum() / clips), "duration_s": group["duration_s"].sum() / clips,
            "events_mean": group["events"].sum() / clips,
            "captions_per_clip": group["captions"].sum() / clips,
            "questions_per_clip": group["questions"].sum() / clips,
            "clips_left_out": int(group["clips_left_out"].sum()),
        })
    return pd.DataFrame(rows)


def samples(clips: Iterable[tuple[str, Clip]], frames: int = 8) -> tuple[pd.DataFrame, np.ndarray]:
    """Evenly spaced frames of one clip per (domain, clip), for looking at.

    Returns a table (domain, clip, frames, caption, question, answer) and a picture, uint8
    `[rows * H, frames * W, 3]`, with one row of frames per line of the table.
    """
    rows, strips = [], []
    for domain, clip in clips:
        pictures = read_frames(clip.path)
        picked = uniform(len(pictures), frames)
        question = clip.questions[0]
        rows.append({
            "domain": domain, "clip": clip.id, "frames": " ".join(map(str, picked)),
            "caption": clip.captions["en"][0], "question": question.text,
            "answer": question.choices[question.answer],
        })
        strips.append(np.concatenate(list(pictures[picked]), axis=1))
    return pd.DataFrame(rows), np.concatenate(strips)


def guess_table(domains: Sequence[str], clips: int, seed: int) -> pd.DataFrame:
    """`text_only_guess` per domain, trained on `clips` training clips' questions, tested on as many val."""
    tables = []
    for domain in domains:
        asked = {
            part: [q for i in range(clips) for q in questions(sample_scene(DOMAINS[domain], part, i, seed))]
            for part in ("train", "val")
        }
        table = text_only_guess(asked["train"], asked["val"])
        table.insert(0, "domain", domain)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def leaks(sentences: int, seed: int) -> list[str]:
    """What must not be in the source: text-only sentences with a target-only pair, source captions likewise.

    `sentences` of each are drawn, spread over the languages; an empty list is the good result.
    """
    number = {sprite.names["en"]: sprite.index for sprite in SPRITES}
    drawn = []
    for i in range(sentences):
        language = LANGUAGES[i % len(LANGUAGES)]
        drawn.append((text_only(np.random.default_rng([seed, i]), language), language))
        scene = sample_scene(DOMAINS["source"], "train", i, seed)
        drawn.append((captions(scene, language)[i % 5], language))
    found = []
    for text, language in drawn:
        pairs = [(number[name], motion) for name, motion in parse(text, language) if motion != "aside"]
        if any(target_only_pair(*pair) for pair in pairs):
            found.append(text)
    return found


def same_videos(roots: Iterable[Path]) -> list[str]:
    """Clips whose video file has the bytes of another clip's, in any part of the domain folders `roots`."""
    seen: dict[str, str] = {}
    twice = []
    for root in roots:
        for line in (Path(root) / "rendered.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if seen.setdefault(row["sha256"], row["video_id"]) != row["video_id"]:
                twice.append(row["video_id"])
    return twice
