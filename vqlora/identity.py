"""What a result depends on, as hashes: code by its syntax trees, data and weights by their bytes. Provenance.

A hash here answers "would this come out the same?": comments, docstrings and time stamps do not count.
"""
from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

PACKAGE = Path(__file__).resolve().parent
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "av", "decord", "numpy", "pycocoevalcap")
GENERATED = ("figures", "paper/generated", "results")        # made by make: no dirty tree
_PARSER = Lock()


def digest(*parts: Any) -> str:
    """16 hex digits over the parts, each bytes or a JSON value."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:16]


def code_hash(modules: Iterable[str], package: Path = PACKAGE) -> str:
    """Hash over the syntax trees of the named modules of `package` and of all its modules that they import.

    Imports inside functions count; docstrings, comments and layout do not. `modules` are dotted names such as
    `vqlora.train`; names outside the package are passed over, since the lock pins them.
    """
    waiting, trees = sorted(set(modules)), {}
    while waiting:
        name = waiting.pop()
        path = module_file(name, package)
        if path is None or name in trees:
            continue
        trees[name], imported = _parsed(path, path.stat().st_mtime_ns, name)
        waiting.extend(imported)
    return digest(sorted(trees.items()))


def imports_of(tree: ast.AST, module: str = "", is_package: bool = False) -> set[str]:
    """Dotted names that `tree` may import: `from a import b` gives `a`, `a.b`. Relative: needs `module`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[:len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def module_file(name: str, package: Path = PACKAGE) -> Path | None:
    """Source file of a module of `package`, or None for a name that is not one."""
    first, *rest = name.split(".")
    if first != package.name:
        return None
    folder = package.joinpath(*rest)
    for path in (folder / "__init__.py", folder.with_suffix(".py") if rest else folder / "__init__.py"):
        if path.is_file():
            return path
    return None


def parse(text: str | bytes, name: str = "<text>") -> ast.Module:
    """A syntax tree. One at a time: two threads that parse confuse Python 3.11 about how deep each one is."""
    with _PARSER:
        return ast.parse(text, filename=name)


@cache
def _parsed(path: Path, _mtime_ns: int, name: str) -> tuple[str, frozenset[str]]:
    tree = parse(path.read_bytes(), str(path))
    return tree_hash(tree), frozenset(imports_of(tree, name, path.name == "__init__.py"))


def tree_hash(tree: ast.AST) -> str:
    """Hash of a syntax tree without its docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = getattr(node.body[0], "value", None)
            if isinstance(node.body[0], ast.Expr) and isinstance(getattr(first, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
    return digest(ast.dump(tree))


def folder_hash(folder: Path, *, skip: tuple[str, ...] = (".md", ".csv")) -> str:
    """Hash over names and bytes of all files below `folder`, "" without any.

    Notes, and what was measured of the weights (`skip`), do not count.
    """
    rows = []
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix not in skip):
        rows.append([path.relative_to(folder).as_posix(), file_hash(path)])
    return digest(rows) if rows else ""


def file_hash(path: Path) -> str:
    """16 hex digits of the file's sha256."""
    with Path(path).open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()[:16]


def data_hash(root: Path, domain: str) -> str:
    """Hash of one data set: bytes of its annotations, names and sizes of its videos. "" if it is missing."""
    rows = []
    for path in sorted(p for p in Path(root, domain).rglob("*") if p.is_file()):
        text = path.suffix in (".json", ".jsonl", ".csv", ".txt", ".yaml")
        rows.append([path.relative_to(root).as_posix(), file_hash(path) if text else path.stat().st_size])
    return digest(rows) if rows else ""


def base_hash(base: str, assets: Path = PACKAGE / "assets" / "kinevlm") -> str:
    """Hash of the weights `base` names: the released ones, a folder, else a hub checkpoint by its name."""
    folder = assets if base == "released" else Path(base)
    return folder_hash(folder) or digest("name", base)


def provenance(root: Path, **more: Any) -> dict[str, Any]:
    """Where and with what a result was made: commit, dirty flag, versions, processor, threads, time."""
    def installed(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    left_out = (f":(top,exclude){path}" for path in GENERATED)
    changed = _git(root, "status", "--porcelain", "--", ":/", *left_out)
    model, flags = processor()
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version(),
            "versions": {name: installed(name) for name in VERSIONS}, "system": platform.platform(),
            "processor": model, "processor_flags": flags, "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"), **more}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> tuple[str, list[str]]:
    """Model name and those instruction sets that decide which kernels run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), []
    rows = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm")
    flags = rows.get("flags", rows.get("Features", "")).split()
    return rows.get("model name", platform.machine()), [flag for flag in wanted if flag in flags]
