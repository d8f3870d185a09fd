"""A sealed checkout with invented results, the real text and claims; for tests of what verification sees."""

import json
import shutil
from pathlib import Path

from invented_results import write_invented

from vqlora.report.seal import write_seal

ROOT = Path(__file__).resolve().parents[1]


def sealed_checkout(root: Path) -> Path:
    """`root`, with results, tolerances, paper sources, claims and a figure, all sealed."""
    write_invented(root / "results")
    shutil.copy(ROOT / "results" / "tolerances.toml", root / "results")
    shutil.copytree(ROOT / "paper", root / "paper", ignore=shutil.ignore_patterns("generated"))
    (root / "figures").mkdir()
    (root / "figures" / "planner.pdf").write_bytes(b"%PDF a figure")
    write_seal(root)
    return root


def regenerated(
    checkout: Path, profile: str = "cpu", flags: tuple = ("avx2",), notebook: str = "03_main"
) -> Path:
    """A copy of a notebook's results as if made anew; both get manifests."""
    manifest = {"profile": "cpu", "processor_flags": ["avx2"], "versions": {"torch": "2"}}
    made = checkout / "build" / profile / "results"
    shutil.copytree(checkout / "results" / notebook, made / notebook)
    (checkout / "results" / notebook / "manifest.json").write_text(json.dumps(manifest))
    own = {**manifest, "profile": profile, "processor_flags": list(flags)}
    (made / notebook / "manifest.json").write_text(json.dumps(own))
    return made


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
