"""Questions in the form of MSRVTT-QA, beside any data set whose clips have its ids."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqlora.data.clips import LeftOut, Loaded, Question
from vqlora.data.rows import read_json

_QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the kinds MSRVTT-QA is reported by


def attach_questions(loaded: Loaded, path: Path) -> Loaded:
    """Add the questions of an MSRVTT-QA file (or ours, with `kind` and `choices`) to the clips it names.

    A number as `video_id` means `video<number>`. Without `choices` a question is open: its answer is the only
    one. Without `kind` the question word is. Rows of clips that are not in `loaded` belong to other parts.
    """
    questions: dict[str, list[Question]] = {clip.id: [] for clip in loaded.clips}
    left_out, seen, read = list(loaded.left_out), set(), loaded.read
    table = read_json(path, list, "MSRVTT-QA questions: [{id, video_id, question, answer}]")
    for number, row in enumerate(table):
        row = row if isinstance(row, dict) else {}
        video = row.get("video_id")
        name = f"video{video}" if isinstance(video, int) else video
        if isinstance(name, str) and name not in questions:
            continue
        read += 1
        question, reason = question_of(row)
        label = str(row.get("id", f"row {number}"))
        if not isinstance(name, str):
            reason = "no video_id"
        elif label in seen:
            reason = "question id used twice; the first is kept"
        if reason:
            left_out.append(LeftOut(str(path), f"question {label}", reason))
        else:
            seen.add(label)
            questions[name].append(question)
    clips = (dataclasses.replace(c, questions=c.questions + tuple(questions[c.id])) for c in loaded.clips)
    return dataclasses.replace(loaded, clips=tuple(clips), left_out=tuple(left_out), read=read)


def question_of(row: Mapping[str, Any]) -> tuple[Question | None, str | None]:
    """(question, None) of a row with `question`, `answer`, maybe `choices` and `kind`; or (None, reason)."""
    text, answer = row.get("question"), row.get("answer")
    choices = row.get("choices", [answer])
    if not all(isinstance(value, str) and value.strip() for value in (text, answer)):
        return None, "question or answer is empty"
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return None, "choices are not a list of texts"
    if answer not in choices or len(set(choices)) < len(choices):
        return None, "the answer is not among the choices, or two choices are alike"
    word = text.split()[0].lower()
    kind = row.get("kind") or (word if word in _QUESTION_WORDS else "other")
    return Question(str(kind), text.strip(), tuple(choices), choices.index(answer)), None
