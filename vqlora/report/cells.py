"""What every table is made of: its shape, the names of rows and columns, and reading a results file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vqlora.report.keys import ResultsError, format_interval, format_number, latex_text

ARMS = {"frozen": "Frozen", "full": "Full fine-tuning", "lora": "LoRA, 16 bit", "qlora": "QLoRA, NF4"}
SHORT = {"frozen": "frozen", "full": "full", "lora": "LoRA", "qlora": "QLoRA"}
CLAIMS = {"equivalent": "equals", "no_worse": "is no worse than", "greater": "beats"}
NOT_RUN = "not run with this profile"
DOMAINS = {
    "source": "Source",
    "language": "Language shift",
    "visual": "Visual shift",
    "bursts": "Bursts",
    "degraded": "Degraded motion",
    "degraded-twin": "Degraded, twin",
    "inserts": "Inserts",
    "inserts-twin": "Inserts, twin",
    "cutaways": "Cutaways",
    "cutaways-twin": "Cutaways, twin",
    "distractor": "Distractors",
    "source-noise0": "Source, no noise",
    "source-noise8": "Source, twice the noise",
    "source-noise16": "Source, fourfold noise",
    "source-crf28": "Source, crf 28",
    "source-crf38": "Source, crf 38",
}
METRICS = {
    "nll": "NLL",
    "slot_frac": "Slot",
    "exact_frac": "Exact",
    "order_frac": "Order",
    "cider": "CIDEr-D",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "bleu4": "BLEU-4",
    "t2v_r1": "R@1",
    "v2t_r1": "R@1 (v2t)",
    "qa_frac": "QA",
    "token_accuracy_frac": "Tokens",
    "train_bytes": "Memory",
    "trainable_frac": "Trainable",
    "clips": "Clips",
    "learning_rate": "Learning rate",
}


# What memory is made of, in every figure the same colour: Okabe and Ito's, and greys for what is left over.
MEMORY_COLOURS = {
    "Weights": "#0072B2",
    "Constants of quantization": "#000000",
    "Adapters": "#009E73",
    "Optimizer": "#D55E00",
    "Inputs": "#F0E442",
    "Gradients": "#E69F00",
    "Activations": "#56B4E9",
    "Logits": "#CC79A7",
    "Working memory": "#999999",
    "Not explained": "#DDDDDD",
}


@dataclass(frozen=True)
class Table:
    """Cells as LaTeX text, row by row; a row of None is a rule between groups.

    ``left`` is the number of left-aligned columns; the others are aligned to the right. With ``wide`` the
    first column breaks its lines at that width.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...] | None, ...]
    left: int = 1
    wide: str = ""

    def latex(self) -> str:
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        if self.wide:
            columns = rf"p{{{self.wide}}}" + columns[1:]
        lines = [
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            " & ".join(self.head) + r" \\",
            r"\midrule",
        ]
        lines += [r"\midrule" if row is None else " & ".join(row) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(map(plain, self.head)) + " |",
            "|" + "---|" * self.left + "---:|" * (len(self.head) - self.left),
        ]
        lines += ["| " + " | ".join(map(plain, row)) + " |" for row in self.rows if row is not None]
        return "\n".join(lines) + "\n"


def plain(cell: str) -> str:
    """A LaTeX cell of this module as plain text, for Markdown."""
    cell = re.sub(
        r"\\(?:scriptsize|small|textbf|emph|ensuremath|times|pm|,)\s?",
        lambda m: {"\\times": "×", "\\pm": "±"}.get(m.group(0).strip(), ""),
        cell,
    )
    cell = re.sub(r"\^\{(.*?)\}", r"^\1", cell)
    return (
        re.sub(r"\\([&%$#_{}])|[{}]", lambda m: m.group(1) or "", cell)
        .replace("~", " ")
        .replace("|", "\\|")
        .strip()
    )


def read_csv(results: Path, file: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A results file as a data frame, or one clear error that names the file and what it lacks."""
    path = Path(results) / file
    if not path.is_file():
        raise ResultsError(f"{path}: missing; `make {file[:2]}` writes it")
    frame = pd.read_csv(path)
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ResultsError(f"{path}: no column {', '.join(missing)} (it has {', '.join(frame.columns)})")
    if frame.empty:
        raise ResultsError(f"{path}: no rows")
    return frame


def ordered(names: Sequence[str], order: Mapping[str, str]) -> list[str]:
    """The names in the order of the mapping, then the ones it does not know, by name."""
    known = [name for name in order if name in set(names)]
    return known + sorted(set(names) - set(known))


def label(name: str, names: Mapping[str, str]) -> str:
    return names.get(name, latex_text(str(name).replace("_", " ")))


def verdict_cells(row: Mapping, metric: str) -> tuple[str, ...]:
    """Of a planned test: gain, interval, smallest gain it would have found, corrected p, verdict."""
    return (
        format_number(row["value"], metric),
        format_interval(row["low"], row["high"], metric),
        format_number(row["smallest_effect"], metric),
        format_number(row["p_holm"], "p_holm"),
        latex_text(row["verdict"]),
    )


def rate_cell(hit: pd.DataFrame) -> str:
    """NLL of the row of a sweep that `hit` holds, bold where its rate was chosen; -- without one."""
    text = format_number(hit.iloc[0]["value"], "nll") if len(hit) else "--"
    return rf"\textbf{{{text}}}" if len(hit) and bool(hit.iloc[0]["chosen"]) else text
