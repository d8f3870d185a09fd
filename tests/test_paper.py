"""The paper's sources: all sections, numbers by key, references that exist and are used; and the PDF."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from invented_results import write_invented

from vqlora.report.paper import PaperError, build_pdf, first_error, inputs_hash, results_dir, write_parts
from vqlora.report.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "paper"
SECTIONS = [
    ("section", "Introduction"),
    ("section", "Background and Related Work"),
    ("subsection", "Multimodal Learning with Video-Text"),
    ("subsection", "Parameter-Efficient Fine-Tuning (PEFT)"),
    ("subsection", "Limitations of Prior Work"),
    ("section", "Preliminaries"),
    ("subsection", "QLoRA Overview"),
    ("subsection", "Video-Text Model Architecture"),
    ("subsection", "Temporal and Modality Challenges"),
    ("section", "Methodology"),
    ("subsection", "Applying QLoRA to Video-Text Models"),
    ("subsection", "Temporal-Aware QLoRA"),
    ("subsection", "Cross-Modality Rank Allocation"),
    ("subsection", "Quantization-Aware Frame Selection"),
    ("subsection", "Theoretical Analysis"),
    ("section", "Experimental Setup"),
    ("subsection", "Datasets"),
    ("subsection", "Tasks and Metrics"),
    ("subsection", "Baselines"),
    ("section", "Results and Evaluation"),
    ("subsection", "Quantitative Results"),
    ("subsection", "Efficiency and Memory Usage"),
    ("subsection", "Ablation Studies"),
    ("subsection", "Allocation of Ranks"),
    ("subsection", "Temporal Gating"),
    ("subsection", "The Primary Claims on New Seeds and Clips"),  # ours, beside those of the outline
    ("subsection", "Qualitative Analysis"),
    ("section", "Discussion"),
    ("section", "Limitations and Future Work"),
    ("section", "Conclusion"),
    ("section", "Model Hyperparameters"),
    ("section", "Hardware and Training Details"),
    ("section", "Additional Ablation Graphs and Tables"),
    ("section", "License and Ethical Considerations"),
    ("section", "Additional Experiments"),
]
needs_latex = pytest.mark.skipif(shutil.which("latexmk") is None, reason="LaTeX is not installed")


def read(path: Path) -> str:
    """A LaTeX file without its comments."""
    return re.sub(r"(?<!\\)%.*", "", path.read_text(encoding="utf-8"))


def paper_text() -> str:
    """The sources in the order in which main.tex reads them."""
    main = read(PAPER / "main.tex")
    return re.sub(r"\\input\{(sections/\w+)\}", lambda match: read(PAPER / f"{match[1]}.tex"), main)


def prose(text: str) -> str:
    """What a reader reads as words and numbers: without keys, citations, labels, file names and lengths."""
    text = re.sub(r"\\begin\{(equation|align)\}.*?\\end\{\1\}", " ", text, flags=re.S)
    text = re.sub(r"\\vqclaim\{[^{}]*\}", " ", text)  # its words are prose
    text = re.sub(
        r"\\(?:vq|vqci|vqcase|vqstates|vqfound|vqexpected|cite[pt]?|ref|label|includegraphics|code|made|resulttable|input|url|setlength|"
        r"begin\{minipage\}|vspace|hspace)\*?(?:\[[^]]*\])*(?:\{[^{}]*\})+",
        " ",
        text,
    )
    return re.sub(r"[\d.]+\s*(?:\\linewidth|\\textwidth|pt|cm|em|in)\b", " ", text)


def typed_results(text: str) -> list[str]:
    """Numbers in prose that look like results: decimals, percentages, values with a unit of size or time."""
    looks = (
        r"\d+[.,]\d+|\d+(?:\\,|\s)*\\%|\d+(?:\s*per ?cent|-fold|\s+times\b|\s*percentage points)"
        r"|\d+(?:[ ~]|\\,)+(?:MB|GB|kB|ms|seconds|minutes|hours)\b"
    )
    text = prose(text).replace("CC BY-SA 4.0", "").replace("Apache License 2.0", "")
    return [match[0] for match in re.finditer(looks, text) if match[0] != r"95\%"]


def test_every_section_of_the_outline_in_its_order():
    found = re.findall(r"\\(section|subsection)\{([^}]*)\}", paper_text())
    assert found == SECTIONS


def test_appendices_come_after_the_references():
    text = paper_text()
    assert text.index(r"\bibliography{") < text.index(r"\appendix") < text.index("Model Hyperparameters")


def test_every_section_says_something():
    pieces = re.split(r"\\((?:sub)?section)\{", paper_text())[1:]
    for level, piece, after in zip(pieces[::2], pieces[1::2], [*pieces[2::2], "section"], strict=True):
        title, _, body = piece.partition("}")
        words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-z]+(\{[^}]*\})?", " ", body))
        only_holds_subsections = level == "section" and after == "subsection"
        assert len(words) >= 10 or only_holds_subsections, f"section '{title}' has {len(words)} words"


@pytest.mark.parametrize("file", sorted(PAPER.glob("sections/*.tex")), ids=lambda path: path.stem)
def test_no_result_is_typed(file):
    assert typed_results(read(file)) == []


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        (r"QLoRA reaches 0.742 nats", ["0.742"]),
        (r"it saves 83\,\% of it", [r"83\,\%"]),
        (r"saves 83 per cent, 3 times less", ["83 per cent", "3 times"]),
        (r"it saves 83\% of memory", [r"83\%"]),
        (r"which takes 12 MB", ["12 MB"]),
        (r"\vq{main.a.nll} of 64 by 64", []),
        (r"\vqclaim{a}{saves 83\%}{no}{}{}, \vqfound{a}", [r"83\%"]),
        (r"\includegraphics[width=0.5\linewidth]{a}", []),
        (r"a 95\% interval", []),
        (r"about 3,5 points", ["3,5"]),
        (r"\begin{equation} 0.5 x \end{equation}", []),
    ],
)
def test_the_check_finds_typed_results(sentence, found):
    assert typed_results(sentence) == found


FINDING = (
    r"\b(?:beats?|better|worse|lowers?|higher|less|fewer|equals?|equivalent|saves?|closes|loses?|gains?|wins?)\b"
)


def unclaimed_findings(text: str) -> list[str]:
    """Sentences that compare or find something without a claim to take their words from."""
    argument = r"\s*%?\s*\{(?:[^{}]|\{[^{}]*\})*\}"
    text = re.sub(rf"\\vqclaim\{{[^{{}}]*\}}(?:{argument}){{4}}", "", text)
    sentences = re.split(r"(?<=[.:;])\s", re.sub(r"\s+", " ", text))
    return [x for x in sentences if re.search(FINDING, x) and "vqstates" not in x and r"\cite" not in x]


@pytest.mark.parametrize("section", ["abstract", "conclusion"])
def test_every_finding_is_a_claim(section):
    assert unclaimed_findings(read(PAPER / "sections" / f"{section}.tex")) == []


def test_the_check_finds_unclaimed_findings():
    text = r"It beats LoRA. It \vqclaim{a}{saves \vqfound{a}}{saves less}{}{}. \vqstates{b}It is better."
    assert unclaimed_findings(text) == ["It beats LoRA."]


def test_every_reference_exists_and_is_cited():
    cited = {
        key.strip()
        for group in re.findall(r"\\cite[pt]?\*?(?:\[[^]]*\])*\{([^}]*)\}", paper_text())
        for key in group.split(",")
    }
    bib = (PAPER / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,]+),", bib, flags=re.M)
    assert len(entries) == len(set(entries)) >= 30
    assert sorted(cited - set(entries)) == [], "cited but not in references.bib"
    assert sorted(set(entries) - cited) == [], "in references.bib but not cited"


def test_every_reference_has_author_title_and_year():
    for entry in re.split(r"^@", (PAPER / "references.bib").read_text(encoding="utf-8"), flags=re.M)[1:]:
        fields = set(re.findall(r"^\s*(\w+)\s*=", entry, flags=re.M))
        assert {"author", "title", "year"} <= fields, entry.splitlines()[0]
        assert fields & {"booktitle", "journal", "note", "howpublished"}, f"no venue: {entry.splitlines()[0]}"


def test_every_table_and_figure_is_made_and_names_its_notebook():
    text = paper_text()
    tables = set(re.findall(r"\\resulttable\{(\w+)\}", text))
    figures = set(re.findall(r"\\includegraphics(?:\[[^]]*\])?\{(\w+)\}", text))
    from vqlora.report.plots import FIGURES

    assert tables == {*TABLES, "claims"} and figures == set(FIGURES)
    captions = re.findall(r"\\caption\{(.*?)\}\s*\\label", text, flags=re.S)
    by_hand = [caption for caption in captions if r"\written" in caption]
    assert len(captions) == len(tables) + len(figures) + len(by_hand) and len(by_hand) == 1, "the notation"
    assert [caption for caption in captions if r"\made{" not in caption] == by_hand


def test_every_label_is_referred_to_and_every_reference_has_its_label():
    text = paper_text()
    labels, refs = re.findall(r"\\label\{([^}]*)\}", text), set(re.findall(r"\\ref\{([^}]*)\}", text))
    assert len(labels) == len(set(labels)) and sorted(refs - set(labels)) == []
    floats = {name for name in labels if name.startswith(("tab:", "fig:"))}
    assert sorted(floats - refs) == [], "a table or figure that no sentence mentions"


def test_only_packages_of_the_small_latex_set():
    allowed = "fontenc inputenc lmodern geometry microtype amsmath amssymb graphicx booktabs subcaption"
    allowed = {*allowed.split(), "float", "natbib", "hyperref", "vqkeys"}
    used = {
        name
        for group in re.findall(r"\\usepackage(?:\[[^]]*\])?\{([^}]*)\}", read(PAPER / "main.tex"))
        for name in group.split(",")
    }
    assert used <= allowed


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A checkout's paper and style, with invented results for a profile called `made-up`."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(PAPER, root / "paper", ignore=shutil.ignore_patterns("generated"))
    (root / "figures").mkdir()
    shutil.copy(ROOT / "figures" / "vqlora.mplstyle", root / "figures")
    write_invented(results_dir("made-up", root))
    return root


SHORT = r"""
\section{Results}\label{sec:short}
NLL \vq{main.language.qlora.nll} in Section~\ref{sec:short}, after \citet{%s}.
\begin{table}\caption{A table.}\fitted{\resulttable{main}}\end{table}
\begin{figure}\includegraphics[width=\linewidth]{quality_memory}\caption{A figure.}\end{figure}
"""


@pytest.fixture
def short(project, tmp_path, monkeypatch) -> Path:
    """That checkout with a paper of one page: LaTeX in seconds. `make smoke` compiles the real text."""
    from vqlora.report import plots

    monkeypatch.setattr(plots, "FIGURES", {"quality_memory": plots.FIGURES["quality_memory"]})
    root = shutil.copytree(project, tmp_path / "project")
    for path in (root / "paper" / "sections").glob("*.tex"):
        path.write_text("")
    entry = re.search(r"^@\w+\{([^,]+),", (PAPER / "references.bib").read_text(encoding="utf-8"), flags=re.M)
    (root / "paper" / "sections" / "results.tex").write_text(SHORT % entry[1])
    return root


def test_figures_are_drawn_anew_only_where_results_or_files_changed(short, monkeypatch):
    from vqlora.report import plots

    drawn, draw = [], plots.FIGURES["quality_memory"]
    counted = {"quality_memory": lambda results: drawn.append(1) or draw(results)}
    monkeypatch.setattr(plots, "FIGURES", counted)

    def made() -> int:
        drawn.clear()
        paths = write_parts("made-up", short, tables=False)
        assert [path.name for path in paths] == ["quality_memory.pdf", "quality_memory.png"]
        assert all(path.read_bytes() == first[path.name] for path in paths if path.name in first)
        return len(drawn)

    first = {}
    assert made() == 1
    folder = short / "build" / "made-up" / "paper" / "figures"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made() == 0
    (folder / "quality_memory.png").write_bytes(b"tampered")
    assert made() == 1
    (folder / "quality_memory.pdf").unlink()
    assert made() == 1 and made() == 0
    costs = results_dir("made-up", short) / "13_architectures" / "runs.csv"
    costs.write_text(costs.read_text() + "\n")
    assert made() == 1


@needs_latex
def test_pdf_is_byte_identical_stamped_and_not_built_twice(short):
    pdf = build_pdf("made-up", short)
    first, when = pdf.read_bytes(), pdf.stat().st_mtime_ns
    assert pdf == short / "build" / "made-up" / "paper" / "main.pdf" and first.startswith(b"%PDF")
    assert build_pdf("made-up", short).stat().st_mtime_ns == when, "nothing changed, nothing is built"
    assert not list(pdf.parent.glob(".latex-*"))
    pdf.write_bytes(b"%PDF tampered")
    assert build_pdf("made-up", short).read_bytes() == first
    assert sorted(path.name for path in (short / "paper").iterdir()) == sorted(
        path.name for path in PAPER.iterdir() if path.name != "generated"
    ), "the sources stay as they are"


def test_the_first_page_says_whether_the_numbers_were_verified(project, tmp_path):
    for words, said in (({}, "switched off"), ({"verified": "Verified: 8 checks hold."}, "8 checks hold")):
        out = tmp_path / said[:3]
        write_parts("made-up", project, figures=False, out=out, **words)
        assert said in (out / "generated" / "keys.tex").read_text()
    assert r"\vqverified" in read(PAPER / "main.tex")


@needs_latex
def test_a_sentence_takes_the_words_of_its_verdict_and_none_states_what_is_denied(tmp_path):
    shutil.copy(PAPER / "vqkeys.sty", tmp_path)
    words = "".join(
        rf"\vqsetclaim{{c{n}}}{{{verdict}}}{{7}}{{8}}"
        rf"\vqclaim{{c{n}}}{{\typeout{{{n}:a}}}}{{\typeout{{{n}:b}}}}{{\typeout{{{n}:c}}}}{{\typeout{{{n}:d}}}}"
        for n, verdict in enumerate(("supported", "denied", "undecided", "not run"))
    )

    def latex(more: str) -> str:
        head = r"\documentclass{article}\usepackage{vqkeys}\begin{document}"
        (tmp_path / "a.tex").write_text(rf"{head}{words}{more}x\end{{document}}")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    said = latex(r"\vqstates{c0}")
    assert re.findall(r"\b\d:\w", said) == ["0:a", "1:b", "2:c", "3:d"] and "Error" not in said
    assert "The text states claim 'c1', which is denied" in latex(r"\vqstates{c1}")
    assert "Unknown claim 'c9'" in latex(r"\vqfound{c9}")


@needs_latex
def test_unknown_key_and_bad_verdict_stop_with_file_line_and_key(short):
    section = short / "paper" / "sections" / "conclusion.tex"
    before = section.read_text()
    section.write_text(before + "\n\\vq{main.language.qlora.nil}\n")
    line = section.read_text().splitlines().index(r"\vq{main.language.qlora.nil}") + 1
    with pytest.raises(
        PaperError,
        match=rf"conclusion\.tex, line {line}: .*Unknown results key "
        r"'main\.language\.qlora\.nil'",
    ):
        build_pdf("made-up", short)
    section.write_text(before + "\n\\vqcase{main.language.qlora.nll}{a}{b}{c}\n")
    with pytest.raises(PaperError, match=r"'0\.748', not a verdict"):
        build_pdf("made-up", short)
    section.write_text(before + "\n\\citep{nobody2020}\n")
    with pytest.raises(PaperError, match="nobody2020"):
        build_pdf("made-up", short)


def test_missing_results_are_named(project, tmp_path, monkeypatch):
    monkeypatch.setattr("vqlora.report.paper._latexmk", lambda: "latexmk")
    root = shutil.copytree(project, tmp_path / "project")
    (results_dir("made-up", root) / "03_main" / "summary.csv").unlink()
    with pytest.raises(PaperError, match=r"03_main/summary\.csv: missing; `make 03` writes it"):
        build_pdf("made-up", root)


def test_without_latex_there_is_one_clear_message(project, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    shutil.rmtree(project / "build" / "made-up" / "paper", ignore_errors=True)
    with pytest.raises(PaperError, match=r"^LaTeX is missing .*apt-get install [^\n]*$"):
        build_pdf("made-up", project)


def test_hash_of_the_inputs_sees_a_word_and_a_number(project, tmp_path):
    root = shutil.copytree(project, tmp_path / "project")
    results = results_dir("made-up", root)
    before = inputs_hash("made-up", root, results)
    assert before == inputs_hash("made-up", root, results) != inputs_hash("other", root, results)
    section = root / "paper" / "sections" / "abstract.tex"
    section.write_text(section.read_text().replace("QLoRA", "qLoRA", 1))
    second = inputs_hash("made-up", root, results)
    file = results / "02_base" / "validation.csv"
    file.write_text(file.read_text().replace("0.81", "0.82"))
    assert len({before, second, inputs_hash("made-up", root, results)}) == 3


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "(./main.tex\n./sections/results.tex:12: Undefined control sequence.\nl.12 \\foo\n",
            "sections/results.tex, line 12: Undefined control sequence.",
        ),
        ("! LaTeX Error: File `siunitx.sty' not found.\n", "LaTeX Error: File `siunitx.sty' not found."),
        (
            "I was expecting a `,' or a `}'---line 7 of file references.bib\n : x\n",
            "references.bib, line 7: I was expecting a `,' or a `}'---line 7 of file references.bib",
        ),
        ("nothing of note\n", "nothing of note"),
    ],
)
def test_first_error_of_a_log(log, message):
    assert first_error(log) == message
