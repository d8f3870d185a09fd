r"""The PDF, from results files and the sources in ``paper/``, with latexmk.

    from vqlora.report.paper import build_pdf
    build_pdf("cpu")            # build/cpu/results -> build/cpu/paper/main.pdf
    build_pdf("reference")      # results/ (the committed reference) -> build/reference/paper/main.pdf

This is what ``vqlora pdf --profile NAME`` calls. A ``PaperError`` is a message of one or two lines for the
user, to be shown without a traceback. Nothing is written outside ``build/<profile>/paper``. The PDF is
byte-identical as long as results and sources are, and is not built again then (a hash over both decides, not
time stamps).
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vqlora.config import ConfigError
from vqlora.files import write_atomic
from vqlora.report.claims import write_claims
from vqlora.report.drawn import draw
from vqlora.report.keys import UNVERIFIED, ResultsError, write_keys
from vqlora.report.tables import write_tables

REFERENCE = "reference"
EPOCH = "1735689600"  # 2025-01-01: the one date a PDF may carry, whenever it is built
SOURCES = ("*.tex", "*.bib", "*.sty", "sections/*.tex")
CLAIMS = Path("paper", "claims.yaml")
LIMIT_S = 900  # a few seconds on a free machine


class PaperError(RuntimeError):
    """The PDF cannot be built; the message says why and what to do, in a line or two."""


def results_dir(profile: str, root: Path | str = ".") -> Path:
    """Where a profile's results lie: ``build/<profile>/results``; for ``reference`` the committed ones."""
    return Path(root, "results") if profile == REFERENCE else Path(root, "build", profile, "results")


def paper_dir(profile: str, root: Path | str = ".") -> Path:
    """Where a profile's paper is built: ``build/<profile>/paper``."""
    return Path(root, "build", profile, "paper")


def write_parts(
    profile: str,
    root: Path | str = ".",
    *,
    figures: bool = True,
    tables: bool = True,
    results: Path | None = None,
    out: Path | None = None,
    verified: str = UNVERIFIED,
) -> list[Path]:
    """Regenerate keys, tables and figures of a profile from its results files.

    Args:
        profile: name of the profile, or ``reference``.
        root: the repository.
        figures: draw ``<out>/figures/*.pdf`` and ``.png``, unless they are there from the same results.
        tables: write ``<out>/generated/keys.tex``, ``claims.tex`` and ``<out>/generated/tables/*``.
        results, out: folders to use instead of ``results_dir(profile)`` and ``paper_dir(profile)``.
        verified: what became of verification, in a sentence for the first page.

    Returns:
        the files written under ``out``.

    Raises:
        ResultsError: a results file is missing or not of the form needed.
    """
    results, out = results or results_dir(profile, root), out or paper_dir(profile, root)
    written = []
    if tables:
        checked = Path(root, "results", "gpu_check.csv")
        write_keys(results, out / "generated", profile, verified=verified, checked=checked)
        written += [out / "generated" / "keys.tex", *write_tables(results, out / "generated" / "tables")]
        written += write_claims(Path(root) / CLAIMS, results, out / "generated")
    if figures:
        written += draw(results, out / "figures", Path(root, "figures", "vqlora.mplstyle"))
    return written


def _sources(root: Path) -> list[Path]:
    paper = Path(root, "paper")
    return sorted(path for pattern in SOURCES for path in paper.glob(pattern))


def inputs_hash(profile: str, root: Path | str, results: Path, verified: str = UNVERIFIED) -> str:
    """Hash of all that the PDF depends on: paper sources, results files, style, code of this package."""
    digest = hashlib.sha256(f"{profile}\0{EPOCH}\0{verified}\0".encode())
    files: list[Path] = [
        *_sources(Path(root)),
        Path(root) / CLAIMS,
        Path(root, "figures", "vqlora.mplstyle"),
        Path(root, "results", "gpu_check.csv"),
        *sorted(Path(__file__).parent.glob("*.py")),
        *sorted(path for form in ("csv", "png") for path in results.glob(f"[0-9]*/*.{form}")),
    ]
    for path in files:
        if path.is_file():
            digest.update(
                f"{path.parent.name}/{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
            )
    return digest.hexdigest()


def first_error(log: str) -> str:
    """The first error of a LaTeX or BibTeX log in one line, with file and line where the log has them."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if match := re.match(r"(?:\./)?([^\s:]+\.(?:tex|sty|bbl|aux)):(\d+): (.*)", line):
            return f"{match[1]}, line {match[2]}: {_unwrap(match[3], lines[number + 1 :])}"
        if line.startswith("! "):
            return _unwrap(line[2:], lines[number + 1 :])
        if line.startswith(("I couldn't open", "I was expecting", "Repeated entry", "I found no")):
            place = next(
                (
                    m
                    for m in (re.search(r"line (\d+) of file (\S+)", x) for x in lines[number : number + 2])
                    if m
                ),
                None,
            )
            return f"{place[2]}, line {place[1]}: {line}" if place else line
    return next((line for line in reversed(lines) if line.strip()), "no message in the log")


def _unwrap(text: str, rest: Iterable[str]) -> str:
    for line in rest:  # logs break lines at 79 columns and may lose a word's end
        if len(text) < 78 or not line.strip() or line.startswith(("l.", "!", "See ", "Type ")):
            break
        text += line
    return text.strip()


def _latexmk() -> str:
    program = shutil.which("latexmk")
    if program is None or shutil.which("pdflatex") is None:
        raise PaperError(
            "LaTeX is missing (latexmk, pdflatex). On Debian: apt-get install --no-install-recommends "
            "texlive-latex-recommended latexmk lmodern; elsewhere install TeX Live."
        )
    return program


def _compile(work: Path, log: Path) -> Path:
    environment = dict(
        os.environ,
        SOURCE_DATE_EPOCH=EPOCH,
        FORCE_SOURCE_DATE="1",
        TZ="UTC",
        LC_ALL="C",
        max_print_line="1000",
        openout_any="p",
    )
    command = [
        _latexmk(),
        "-pdf",
        "-norc",
        "-interaction=nonstopmode",
        "-halt-on-error",
        "-file-line-error",
        "-silent",
        "main.tex",
    ]
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PaperError(f"LaTeX did not finish within {LIMIT_S} s; see {log}") from None
    text = done.stdout.decode("utf-8", "replace")
    text = (
        "\n".join(
            path.read_text("utf-8", "replace")
            for path in (work / "main.log", work / "main.blg")
            if path.is_file()
        )
        or text
    )
    write_atomic(log, text)
    pdf = work / "main.pdf"
    if done.returncode or not pdf.is_file():
        raise PaperError(f"paper: {first_error(text)}\n(the whole log: {log})")
    if unknown := re.search(
        r"LaTeX Warning: (?:Reference|Citation) [`']([^']+)' .*undefined|"
        r"Package natbib Warning: Citation [`']([^']+)'.*undefined",
        text,
    ):
        raise PaperError(
            f"paper: nothing is called '{unknown[1] or unknown[2]}' (undefined reference; log: {log})"
        )
    return pdf


def build_pdf(
    profile: str, root: Path | str = ".", *, results: Path | None = None, verified: str = UNVERIFIED
) -> Path:
    """Build the paper of a profile from its results files; the path of the PDF.

    Args:
        profile: a profile that has run, or ``reference`` for the committed results.
        root: the repository.
        results: a results folder to use instead of the profile's own.
        verified: what became of verification, for the first page; without it the page says that it was off.

    Raises:
        PaperError: no LaTeX, an error in the sources (file, line and message), or results that are missing.
    """
    root = Path(root)
    results, out = results or results_dir(profile, root), paper_dir(profile, root)
    pdf, log, seal = out / "main.pdf", out / "main.log", out / "inputs.sha256"
    wanted = inputs_hash(profile, root, results, verified)
    if (
        pdf.is_file()
        and seal.is_file()
        and seal.read_text() == f"{wanted} {hashlib.sha256(pdf.read_bytes()).hexdigest()}\n"
    ):
        return pdf
    _latexmk()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".latex-", dir=out))  # own folder: two builds at once do not meet
    try:
        for path in _sources(root):
            target = work / path.relative_to(root / "paper")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        try:
            parts = write_parts(profile, root, results=results, out=work, verified=verified, figures=False)
            figures = write_parts(profile, root, results=results, out=out, tables=False)
        except (ResultsError, ConfigError) as fault:
            raise PaperError(str(fault)) from None
        (work / "figures").mkdir()
        for path in figures:
            shutil.copyfile(path, work / "figures" / path.name)
        data = _compile(work, log).read_bytes()
        for path in parts:
            write_atomic(out / path.relative_to(work), path.read_bytes())
        write_atomic(pdf, data)
        write_atomic(seal, f"{wanted} {hashlib.sha256(data).hexdigest()}\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return pdf
