r"""Numbers for the paper, by key, from results files alone.

A *keyed* results file is a CSV with a column ``metric`` and a column ``value``. The columns before ``metric``
name the row, those after ``value`` add to it (``low`` and ``high`` are its 95% interval):

    03_main/summary.csv      domain,arm,metric,value,low,high
                             language,qlora,nll,0.742,0.701,0.789

gives ``main.language.qlora.nll``: the notebook's name without its number, the file's name unless it is
``summary``, the row's names, the metric. Each further column becomes a key of its own below that
(``...nll.p_holm``). In LaTeX ``\vq{key}`` prints the number, ``\vqci{key}`` its interval and
``\vqcase{key}{supported}{denied}{undecided}`` picks the sentence that a verdict allows; an unknown key stops
LaTeX (see ``paper/vqkeys.sty``).

How a number is printed follows from the metric's name (``kind``), so that it looks the same in prose and
tables.
"""

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vqlora.files import write_atomic

KEY = re.compile(r"[a-z0-9][a-z0-9_.+\-]*\Z")
INTERVAL = ("low", "high")
SCORES = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider")
PLAIN = ("nll", "loss", "margin", "perplexity", "difference", "gain", "ratio")
COUNTS = (
    "cells",
    "clips",
    "clips_left_out",
    "runs",
    "seeds",
    "steps",
    "rank",
    "frames",
    "captions",
    "questions",
    "parameters",
    "trainable_parameters",
    "base_parameters",
    "words",
    "sprites",
    "events",
    "batch_size",
    "examples",
    "files",
)


class ResultsError(ValueError):
    """A results file is missing or not of the form a key, table or figure needs; the message names it."""


@dataclass(frozen=True)
class Value:
    """One number or word of a results file, ready for LaTeX.

    ``text`` and ``interval`` (empty where the file gives none) are LaTeX, ``source`` is file and line;
    ``number`` is what the file holds, ``ends`` its interval.
    """

    text: str
    interval: str
    source: str
    number: float | str = math.nan
    ends: tuple[float, float] | None = None


def kind(metric: str) -> str:
    """What a metric measures, read off its name.

    One of percent, score (printed times 100), loss, bytes, flops, seconds, count, p, rate, two decimals,
    number.
    """
    name = metric.rsplit(".", 1)[-1]
    if name.endswith("_frac") or re.fullmatch(r"(t2v|v2t)_(r\d+|map)", name):
        return "percent"
    if name in SCORES:
        return "score"
    if name in PLAIN or name.endswith("_nll"):
        return "loss"
    if name.endswith("_bytes"):
        return "bytes"
    if name.endswith("_flops"):
        return "flops"
    if name.endswith("_s"):
        return "seconds"
    if name in ("p", "p_holm") or name.startswith("p_"):
        return "p"
    if name.endswith("learning_rate") or name == "weight_decay":
        return "rate"
    if name.endswith(("_to_qlora", "_to_full", "_mean", "questions_per_clip")):
        return "two decimals"
    if name in COUNTS or name.endswith(("_count", "_parameters", "_clips", "_cells")):
        return "count"
    return "number"


def latex_text(text: str) -> str:
    """The text with LaTeX's own characters made harmless."""
    table = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    table.update({character: "\\" + character for character in "&%$#_{}"})
    return "".join(table.get(character, character) for character in text)


def _signed(text: str) -> str:
    return r"\ensuremath{-}" + text[1:] if text.startswith("-") else text


def _decimals(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return _signed(text[1:] if text.startswith("-") and float(text) == 0 else text)


def _scaled(value: float, steps: Iterable[tuple[float, float, str]]) -> str:
    """The value in the first unit (from, divisor, name) whose `from` it reaches."""
    divisor, unit = next(step[1:] for step in steps if abs(value) >= step[0])
    return f"{_decimals(value / divisor, 1)}~{unit}"


def _rate(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:e}".split("e")
    mantissa = f"{float(mantissa):g}"
    times = "" if mantissa == "1" else mantissa + r"\times"
    return rf"\ensuremath{{{times}10^{{{int(exponent)}}}}}"


def format_number(value: float | str, metric: str, *, unit: bool = True) -> str:
    r"""A value as LaTeX prints it, by the kind of its metric.

    Args:
        value: in the unit of the metric's name (fractions, bytes, seconds); text is passed through, escaped.
        metric: the metric's name, which decides the format.
        unit: False leaves the per cent sign out (inside an interval or under a table head that has it).
    """
    if isinstance(value, str):
        return latex_text(value)
    value = float(value)
    if math.isnan(value):
        return "n/a"
    match kind(metric):
        case "percent":
            return _decimals(100 * value, 1) + (r"\%" if unit else "")
        case "score":
            return _decimals(100 * value, 1)
        case "loss":
            return _decimals(value, 3)
        case "bytes":
            return _scaled(value, ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "B")))
        case "flops":
            return _scaled(value, ((1e12, 1e12, "TFLOP"), (1e9, 1e9, "GFLOP"), (0, 1e6, "MFLOP")))
        case "seconds":
            return _scaled(value, ((5400, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms")))
        case "p":
            return r"\ensuremath{<}0.001" if value < 0.001 else _decimals(value, 3)
        case "rate":
            return _rate(value)
        case "two decimals":
            return _decimals(value, 2)
        case "count":
            return _signed(f"{round(value):,}".replace(",", r"\,"))
        case _:
            return _signed(f"{value:.3g}") if value != round(value) else _signed(str(round(value)))


def format_interval(low: float, high: float, metric: str) -> str:
    """``[low, high]`` in the format of the metric, empty where either end is missing."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{format_number(low, metric, unit=False)}, {format_number(high, metric, unit=False)}]"


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _part(text: str) -> str:
    number = _number(text)
    return (
        f"{number:g}".replace("e-0", "e-")
        if isinstance(number, float)
        else text.strip().lower().replace(" ", "-")
    )


def _rows(path: Path, prefix: str) -> Iterable[tuple[str, Value]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        if "metric" not in columns or "value" not in columns:
            return
        names = columns[: columns.index("metric")]
        extra = [column for column in columns[columns.index("value") + 1 :] if column not in INTERVAL]
        for row in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in row or None in row.values():
                raise ResultsError(f"{path}, line {reader.line_num}: {len(columns)} columns expected")
            metric = row["metric"]
            key = ".".join((prefix, *(_part(row[name]) for name in names if row[name] != ""), metric))
            ends = None
            if all(row.get(end, "") != "" for end in INTERVAL):
                ends = float(row["low"]), float(row["high"])
            interval = format_interval(*ends, metric) if ends else ""
            if row["value"] != "":
                number = _number(row["value"])
                yield key, Value(format_number(number, metric), interval, where, number, ends)
            for column in extra:
                if row[column] != "":
                    like = metric if column in ("margin", "reference") else column
                    number = _number(row[column])
                    yield f"{key}.{column}", Value(format_number(number, like), "", where, number)


def prefix(notebook: str, file: str) -> str:
    """First part of a key: ``main`` for ``03_main/summary.csv``, ``main.tests`` for ``03_main/tests.csv``."""
    stem = Path(file).stem
    name = re.sub(r"^\d+_", "", notebook)
    return name if stem == "summary" else f"{name}.{stem}"


def gpu_status(file: Path) -> str:
    """What ``make gpu-check`` came to, from the file it writes; ``not run`` as long as there is none."""
    if not Path(file).is_file():
        return "not run"
    with Path(file).open(newline="", encoding="utf-8") as lines:
        good = [row["status"] == "ok" for row in csv.DictReader(lines)]
    return f"{sum(good)} of {len(good)} checks held"


def collect(results: Path, checked: Path | None = None) -> dict[str, Value]:
    """All keys of a results folder (``<results>/<NN_name>/*.csv``), sorted.

    checked: what ``make gpu-check`` wrote, or would; ``gpu_check.csv`` in the folder unless given.

    Raises:
        ResultsError: no such folder, a key twice, or a key with a character that LaTeX cannot read.
    """
    results = Path(results)
    if not results.is_dir():
        raise ResultsError(f"{results}: no results here; run `make paper` or one notebook first")
    keys: dict[str, Value] = {}
    for path in sorted(results.glob("[0-9]*/*.csv")):
        for key, value in _rows(path, prefix(path.parent.name, path.name)):
            if not KEY.match(key):
                raise ResultsError(f"{path}: key '{key}' may hold a-z 0-9 _ . + - only")
            if key in keys:
                raise ResultsError(f"{path}: key '{key}' occurs twice (also {keys[key].source})")
            keys[key] = value
    checked = checked or results / "gpu_check.csv"
    keys["gpu.status"] = Value(latex_text(gpu_status(checked)), "", checked.name)
    return dict(sorted(keys.items()))


def results_id(results: Path) -> str:
    """Twelve hex digits over all results CSV files of a folder: the runs that a paper was made from."""
    digest = hashlib.sha256()
    for path in sorted(Path(results).glob("[0-9]*/*.csv")):
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


UNVERIFIED = "Verification was switched off."


def keys_tex(keys: Mapping[str, Value], profile: str, runs_id: str, verified: str = UNVERIFIED) -> str:
    """The LaTeX file that defines every key, and the stamp of the first page.

    verified: what became of `vqlora verify`, in a sentence.
    """
    lines = [
        "% Written by vqlora.report.keys from results files; do not edit.",
        rf"\def\vqprofile{{{latex_text(profile)}}}",
        rf"\def\vqrunsid{{{runs_id}}}",
        rf"\def\vqverified{{{latex_text(verified)}}}",
    ]
    lines += [rf"\vqset{{{key}}}{{{value.text}}}{{{value.interval}}}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def write_keys(
    results: Path, generated: Path, profile: str, *, verified: str = UNVERIFIED, checked: Path | None = None
) -> dict[str, Value]:
    """Write ``<generated>/keys.tex`` for a results folder and return the keys."""
    keys = collect(results, checked)
    write_atomic(Path(generated) / "keys.tex", keys_tex(keys, profile, results_id(results), verified))
    return keys
