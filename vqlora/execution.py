"""One notebook executed by papermill in a kernel of its own, what it prints shown as it comes."""
from __future__ import annotations

import ast
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from vqlora.identity import parse


class Marked:
    """A stream whose lines begin with `mark` and come whole, so that those of two notebooks do not mix.

    Of a progress bar, which overwrites its line, the last state is shown.
    """

    def __init__(self, stream: TextIO, mark: str):
        self.stream, self.mark, self.begun = stream, mark, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self._show(line)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        """Show what has no line end yet."""
        self._show(self.begun)
        self.begun = ""

    def _show(self, line: str) -> None:
        if line := line.rstrip("\r").rpartition("\r")[2]:
            self.stream.write(f"{self.mark}{line}\n")


def execute(source: Path, output: Path, parameters: Mapping[str, Any], root: Path, mark: str = "") -> str:
    """Run a notebook in the folder `root`, writing `output`; "" or, if a cell failed, how.

    With a `mark`, what it prints is shown by lines that begin with it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")           # or each measured step says so
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")    # or that it frees what was there before
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"              # this environment's kernel
    quiet, known = "ignore:IProgress not found", os.environ.get("PYTHONWARNINGS", "")
    if quiet not in known:                                   # plain progress bars are meant
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (known, quiet)))
    declared = parameter_names(source)
    unknown = sorted(set(parameters) - set(declared))        # papermill would only warn of these
    if unknown:
        return f"its parameters cell sets {', '.join(declared) or 'nothing'}, but not {', '.join(unknown)}"
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config
    shown = [Marked(stream, mark) if mark else stream for stream in (sys.stdout, sys.stderr)]
    folder = tempfile.TemporaryDirectory(prefix="vqlora-")   # of its sockets: no other user, no other kernel
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder.name}/kernel"}})
    try:
        papermill.execute_notebook(str(source), str(output), parameters=dict(parameters), cwd=str(root),
                                   progress_bar=False, log_output=False, stdout_file=shown[0],
                                   stderr_file=shown[1], kernel_name="python3", language="python",
                                   autosave_cell_every=0, config=sockets)
    except PapermillExecutionError as fault:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(fault)).strip()
        return f"cell {fault.exec_count}: {text.splitlines()[-1]}"
    except DeadKernelError:
        return "its process was killed (out of memory?)"
    finally:
        folder.cleanup()
        if mark:
            for stream in shown:
                stream.close()
    return ""


def parameter_names(path: Path) -> list[str]:
    """Names that the cell tagged `parameters` sets."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    trees = [parse("".join(cell["source"])) for cell in tagged]
    return [node.id for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
