"""Executed notebooks as web pages: ``make html``."""

from __future__ import annotations

from pathlib import Path

from vqlora.files import write_atomic
from vqlora.report.keys import ResultsError


def export(build: Path) -> list[Path]:
    """Write ``<build>/html/NN_name.html`` for every notebook that ran to its end in ``<build>/notebooks``.

    Raises:
        ResultsError: no executed notebook is there.
    """
    from nbconvert import HTMLExporter

    found = sorted(Path(build, "notebooks").glob("[0-9][0-9]_*.ipynb"))
    whole = [path for path in found if "." not in path.stem]  # no .failed, no .part
    if not whole:
        raise ResultsError(f"{Path(build, 'notebooks')}: no executed notebook; run `make paper` first")
    exporter = HTMLExporter()
    return [
        write_atomic(Path(build, "html", f"{path.stem}.html"), exporter.from_filename(str(path))[0])
        for path in whole
    ]
