"""Keys in the paper's text: each is one that a notebook writes, and that the results at hand have."""

import re

import pytest
from invented_results import write_invented
from test_paper import ROOT, paper_text

from vqlora.report.keys import collect
from vqlora.report.paper import results_dir


def keys_used(text: str) -> set[str]:
    return set(re.findall(r"\\vq(?:ci|case)?\{([^}]*)\}", text))


def lacking(used: set[str], keys) -> list[str]:
    """Keys in the text of notebooks that have results; of others the text asks in a claim's words alone."""
    made = {key.split(".")[0] for key in keys}
    return sorted(key for key in used - set(keys) if key.split(".")[0] in made)


def test_every_key_is_one_that_the_notebooks_write(tmp_path):
    keys = collect(write_invented(tmp_path / "results"))
    used = keys_used(paper_text())
    assert len(used) > 20
    assert lacking(used, keys) == []
    intervals = set(re.findall(r"\\vqci\{([^}]*)\}", paper_text()))
    assert [key for key in sorted(intervals) if not keys[key].interval] == []


@pytest.mark.parametrize("folder", ["reference", "cpu", "full"])
def test_every_key_is_in_the_results_at_hand(folder):
    results = results_dir(folder, ROOT)
    if folder != "reference" and not (ROOT / "build" / folder / "stamps" / "91_tables.json").is_file():
        pytest.skip(f"no whole results of {folder} here")
    used, keys = keys_used(paper_text()), collect(results)
    assert (sorted(used - set(keys)) if folder == "reference" else lacking(used, keys)) == []
