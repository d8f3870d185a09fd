"""What `vqlora pdf`, `verify`, `accept` and `html` do; imports wait until a command is given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vqlora.console import lock, say
from vqlora.experiments import load_profile


def pdf(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.report.paper import build_pdf
    from vqlora.report.readme import renew
    root = repository()
    in_place = chosen.profile == "reference" or load_profile(chosen.profile, root).in_place
    if chosen.profile != "reference" and load_profile(chosen.profile, root).main is None:
        say(f"profile {chosen.profile!r} has no section 'main': no paper is made of its results")
        return 0
    with lock(root / "build" / chosen.profile / "lock", "vqlora pdf"):
        pdf = build_pdf(chosen.profile, root, verified=_verified(chosen, root))
        if in_place:
            with lock(root / "build" / "in_place.lock", "vqlora pdf"):
                publish(pdf.parent, root)
    if chosen.profile == "reference":
        renew(root)
    print(os.path.relpath(pdf))
    return 0


def _verified(chosen: argparse.Namespace, root: Path) -> str:
    """What the PDF says of its numbers. Raises PaperError where those of the reference do not hold; results
    of one's own get their paper all the same, which says how many checks fail."""
    from vqlora.report.keys import UNVERIFIED
    from vqlora.report.paper import REFERENCE, PaperError
    from vqlora.report.verify import verify
    if chosen.unverified:
        return UNVERIFIED
    if chosen.profile == "smoke":
        return "Not verified: the numbers of smoke mean nothing."
    found = verify(chosen.profile, root, quick=True)
    if not found.ok:
        told = (f"{len(found.failures)} checks fail: {found.failures[0]} (`vqlora verify --profile "
                f"{chosen.profile}` shows all)")
        if chosen.profile == REFERENCE:
            raise PaperError(f"not built, {told}; --unverified builds it and says so")
        say(f"the PDF says so on its first page: {told}")
    return found.stamp()


def verify(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.report.seal import write_seal
    from vqlora.report.verify import show, verify
    root = repository()
    if chosen.seal:
        say("sealed:", *(os.path.relpath(path) for path in write_seal(root)))
    found = verify(chosen.profile, root, quick=chosen.quick)
    show(found)
    return 0 if found.ok else 1


def accept(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.report.accept import accept
    from vqlora.report.paper import REFERENCE, paper_dir, write_parts
    from vqlora.report.readme import renew
    from vqlora.report.seal import write_seal
    from vqlora.steps import find, steps
    root = repository()
    name = find(chosen.notebook, root)
    step = steps([name], chosen.profile, root)[-1]
    with lock(root / "build" / chosen.profile / "lock", "vqlora accept"):
        for path in accept(name, chosen.profile, root, up_to_date=step.up_to_date()):
            print(os.path.relpath(path))
        write_parts(REFERENCE, root)                         # figures and README follow the new reference
        publish(paper_dir(REFERENCE, root), root)
        renew(root)
        write_seal(root)
    return 0


def html(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.report.html import export
    for path in export(repository() / "build" / chosen.profile):
        print(os.path.relpath(path))
    return 0


def publish(paper: Path, root: Path) -> None:
    """Copy a built paper's figures and generated LaTeX to figures/ and paper/generated/, where different."""
    from vqlora.store import whole_file
    for part, target in (("figures", root / "figures"), ("generated", root / "paper" / "generated")):
        source = paper / part
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            copy, data = target / path.relative_to(source), path.read_bytes()
            if not copy.is_file() or copy.read_bytes() != data:
                with whole_file(copy) as temporary:
                    temporary.write_bytes(data)
