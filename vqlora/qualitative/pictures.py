"""Tables and strips of frames for the figures of notebook 12; clips are chosen by quantiles, never by hand.

A strip is uint8 [H, T * W, 3]: the frames that a model was shown, side by side; `sheet` stacks them, a row of
pictures for each row of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from vqlora import scoring
from vqlora.data.batches import ClipDataset, Layout, pixels
from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip
from vqlora.data.formats.kinemoji import load_kinemoji
from vqlora.data.kinemoji.language import ASIDE_MOTION
from vqlora.files import write_atomic
from vqlora.gate_runs import gate_rows
from vqlora.metrics import retrieval_ranks
from vqlora.qualitative.attention import shows
from vqlora.studies.rank_study import part_of


def strips(data_root: str | Path, domain: str, names: Sequence[str], frames: int = 8) -> list[np.ndarray]:
    """A strip for each named test clip of a rendered domain: the evenly spaced frames a model is shown."""
    clips = load_kinemoji(Path(data_root), domain, "test").clips
    store = FrameStore(clips, Path(data_root) / "cache", progress=False)
    known = {clip.id: clip for clip in clips}
    shown = (ClipDataset([known[name]], store, frames)[0].frames for name in names)
    return [np.concatenate(list(pictures), axis=1) for pictures in shown]


def sheet(strips: Sequence[np.ndarray], path: Path) -> Path:
    """Write strips of one size below each other as a PNG."""
    picture = Image.fromarray(np.concatenate(list(strips)))
    path = Path(path)
    temporary = path.with_suffix(".part.png")
    picture.save(temporary, optimize=True)
    write_atomic(path, temporary.read_bytes())
    temporary.unlink()
    return path


def at_quantiles(values: Mapping[str, float], quantiles: Sequence[float]) -> list[str]:
    """The names whose values lie at the quantiles; ties go by name."""
    ranked = sorted(values, key=lambda name: (values[name], name))
    return [ranked[int(quantile * (len(ranked) - 1))] for quantile in quantiles]


def retrievals(
    model: nn.Module,
    tokenizer,
    clips: Sequence[Clip],
    store,
    *,
    frames: int = 8,
    quantiles: Sequence[float] = (0.25, 0.75, 0.95),
    top: int = 3,
) -> pd.DataFrame:
    """What is found for a text: query (a clip's first reference), clip, rank (of the right clip), place,
    found, caption, similarity, right. Queries are those at quantiles of the rank.
    """
    layout = Layout(tokenizer, scoring.below(model).config.tokens_per_frame)
    data, videos = ClipDataset(clips, store, frames), []
    with scoring.scoring_mode(model):
        for start in range(0, len(data), 32):
            items = [data[n] for n in range(start, min(start + 32, len(data)))]
            times = torch.from_numpy(np.stack([item.times for item in items]))
            shown = pixels([item.frames for item in items])
            videos.append(scoring.encode(model, layout.prefix(frames), shown, times)[1].float())
        rows = [layout.text(clip.captions["en"][0]) for clip in data.clips]
        texts = scoring.embed_texts(model, rows, layout.pad).float()
    similarity = (texts @ torch.cat(videos).T).numpy().astype(float)
    ranks, names = retrieval_ranks(similarity), [clip.id for clip in data.clips]
    made = []
    for name in at_quantiles(dict(zip(names, ranks.tolist(), strict=True)), quantiles):
        asked = names.index(name)
        for place, found in enumerate(np.argsort(-similarity[asked], kind="stable")[:top], start=1):
            made.append((data.clips[asked].captions["en"][0], name, int(ranks[asked]), place, names[found],
                         data.clips[found].captions["en"][0], similarity[asked, found],
                         bool(found == asked)))  # fmt: skip
    columns = ["query", "clip", "rank", "place", "found", "caption", "similarity", "right"]
    table = pd.DataFrame(made, columns=columns)
    table.insert(0, "picture", range(len(table)))
    return table


def attention_map(read: pd.DataFrame, truth: Mapping[str, dict], clip: str) -> pd.DataFrame:
    """One clip's attention, layers averaged, with what is true: place, word, kind, shown, frame, cell,
    weight, here (this frame shows the event that the word tells), there (the event happens in this cell).
    """
    own = read[(read["clip"] == clip) & (read["layer"] == -1)].drop(columns=["clip", "layer"])
    numbers = own.drop_duplicates("shown").sort_values("shown")["frame"].to_numpy()
    events = truth[clip]["events"]
    cells = {actor["name"]: actor["cell"] for actor in truth[clip]["actors"]}
    seen = [shows(event, numbers, truth[clip]["inserted"]) for event in events]
    here = [bool(n >= 0 and seen[n][t]) for n, t in zip(own["event"], own["shown"], strict=True)]
    there = [bool(n >= 0 and cells.get(events[n]["name"]) == c)
             for n, c in zip(own["event"], own["cell"], strict=True)]  # fmt: skip
    return own.drop(columns="event").assign(here=here, there=there).reset_index(drop=True)


def timeline(
    model: nn.Module, clips: Sequence[Clip], store, truth: Mapping[str, dict], *, frames: int = 8
) -> pd.DataFrame:
    """Gates and effective ranks in every frame of the clips, a row each: clip, frame, shown, moving, aside,
    and gate_<part>, rank_<part> for each part of the model (means over its layers, empty where not shown).
    """
    data = ClipDataset(clips, store, frames)
    lengths = {clip.id: len(store[clip.id]) for clip in data.clips}
    rows = gate_rows(model, [data[n] for n in range(len(data))], lengths)
    means = {}
    for head, name in (("gate.", "gate"), ("active.", "rank")):
        layers = [column for column in rows if column.startswith(head)]
        for part in dict.fromkeys(map(part_of, layers)):
            means[f"{name}_{part}"] = rows[[one for one in layers if part_of(one) == part]].mean(axis=1)
    seen = rows[["clip", "frame"]].assign(shown=True, **means).drop_duplicates(["clip", "frame"])
    happens = []
    for clip in data.clips:
        told = truth[clip.id]
        events = [event for event in told["events"] if event["motion"] != ASIDE_MOTION]
        moving = {t for event in events for t in range(event["start"], event["end"])}
        happens += [(clip.id, t, t in moving, t in told["inserted"]) for t in range(told["frames"])]
    table = pd.DataFrame(happens, columns=["clip", "frame", "moving", "aside"])
    table = table.merge(seen, on=["clip", "frame"], how="left")
    return table.assign(shown=table["shown"].eq(True))
