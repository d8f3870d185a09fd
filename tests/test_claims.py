"""Claims: read strictly, judged by number and interval, and held against what the text says."""

from pathlib import Path

import pytest
from invented_results import write_invented

from vqlora.config import ConfigError
from vqlora.report.claims import (
    Claim,
    claims_table,
    claims_tex,
    judge_claims,
    load_claims,
    text_faults,
    verdict,
)
from vqlora.report.keys import ResultsError

ROOT = Path(__file__).resolve().parents[1]
MEMORY = {"claim": "less memory", "origin": "published", "notebook": "03_main", "measure": "reduction",
          "key": "main.language.qlora.train_bytes", "against": "main.language.full.train_bytes"}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return write_invented(tmp_path_factory.mktemp("claims") / "results")


def judged(results: Path, **fields) -> str:
    return judge_claims({"one": Claim(**{**MEMORY, **fields})}, results)[0].verdict


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "tolerance", "word"),
    [
        (0.2, 0.3, 0.25, None, 0, "undecided"),
        (0.26, 0.3, 0.25, None, 0, "supported"),
        (0.2, 0.24, 0.25, None, 0, "denied"),
        (0.2, 0.24, 0.25, None, 0.02, "undecided"),
        (0.24, 0.24, 0.25, 0.25, 0.02, "supported"),
        (0.28, 0.28, 0.25, 0.25, 0.02, "denied"),
        (-1, 0, None, 0, 0, "supported"),
    ],
)
def test_a_verdict_takes_the_whole_interval(low, high, at_least, at_most, tolerance, word):
    assert verdict(low, high, at_least, at_most, tolerance) == word


def test_numbers_are_judged_by_value_ratio_reduction_and_difference(results):
    # bytes: 119.5 of 161.4; NLL: frozen 4.2, QLoRA 0.7475, each ±3%
    assert judged(results, at_least=0.25, at_most=0.27) == "supported"
    assert judged(results, at_least=0.6) == "denied"
    nll = {"key": "main.language.qlora.nll", "against": "main.language.frozen.nll"}
    assert judged(results, **nll, measure="difference", at_most=-3) == "supported"
    assert judged(results, **nll, measure="ratio", at_least=0.178) == "undecided", "its interval spans that"
    alone = {"key": nll["key"], "against": None, "measure": "value"}
    assert judged(results, **alone, at_most=1) == "supported"
    test = {"key": "main.tests.visual.qlora_vs_lora.nll", "against": None, "measure": "value"}
    assert judged(results, **test, expect="verdict") == "undecided"


def test_what_was_not_run_is_said_so_and_a_wrong_key_names_the_nearest(results):
    assert judged(results, at_least=0.6, needs="99_unwritten/claims.csv") == "not run"
    with pytest.raises(ResultsError, match=r"claims\.one: no key '.*train_byte'.*did you mean '.*_bytes'"):
        judged(results, key="main.language.qlora.train_byte", at_least=0.6)


def test_a_small_profile_that_lacks_a_domain_has_not_run_its_claims(results):
    claim = Claim(**{**MEMORY, "key": "main.bursts.qlora.train_bytes"}, at_least=0.6)
    assert [j.verdict for j in judge_claims({"one": claim}, results, strict=False)] == ["not run"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("atleast: 1", r"claims\.one: unknown key 'atleast'.*did you mean 'at_least'"),
        ("origin: yours", r"claims\.one\.origin: 'yours' is not one of ours, published"),
        ("measure: ratio", r"claims\.one: measure 'ratio' needs against"),
        ("tolerance: 0.1", r"claims\.one: a tolerance needs its reason"),
        ("expect: verdict", r"claims\.one: needs either expect: verdict or a bound"),
    ],
)
def test_a_fault_in_the_file_names_file_key_value_and_what_is_allowed(tmp_path, more, words):
    path = tmp_path / "claims.yaml"
    fields = {"claim": "x", "origin": "ours", "notebook": "03_main", "key": "a.b", "at_least": "0"}
    key, value = more.split(": ")
    lines = [f"    {name}: {text}" for name, text in {**fields, key: value}.items()]
    path.write_text("claims:\n  one:\n" + "\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"{path}: {words}"):
        load_claims(path)


def test_the_text_may_not_state_what_the_numbers_deny(results, tmp_path):
    sections = tmp_path / "sections"
    sections.mkdir()
    claims = {"one": Claim(**MEMORY, at_least=0.6, said=("abstract",)), "two": Claim(**MEMORY, at_least=0.2)}
    found = judge_claims(claims, results)
    section = sections / "abstract.tex"
    section.write_text(r"It saves much\vqstates{one}.")
    (fault,) = text_faults(claims, found, sections)
    assert fault == "abstract.tex: states as a fact that less memory; it is denied"
    section.write_text(r"It \vqclaim{one}{saves}{does not save}{may save}{?} much.")
    assert text_faults(claims, found, sections) == []
    section.write_text(r"It \vqclaim{onn}{saves}{does not}{may}{?} much, \vqfound{two}. % \vqclaim{one}")
    faults = text_faults(claims, found, sections)
    assert "\\vqclaim{onn}: no such claim (did you mean 'one'?)" in faults[0]
    assert "does not say claim 'one'" in faults[1] and "says claim 'two'" in faults[2]


def test_the_papers_claims_are_judged_on_invented_and_on_committed_results(results):
    claims = load_claims(ROOT / "paper" / "claims.yaml")
    for folder in (results, ROOT / "results"):
        found = judge_claims(claims, folder)
        assert [j.name for j in found] == list(claims)
        text = claims_tex(found)
        assert text.count(r"\vqsetclaim") == len(claims) and "nan" not in text
    # A memory saving that the committed runs do not show must not come out as supported.
    assert {j.name: j.verdict for j in found}["total-less"] == "denied"
    table = claims_table(found)
    assert {row[3] for row in table.rows} <= {"supported", "denied", "undecided", "not run"}
    published = [claim for claim in claims.values() if claim.origin == "published"]
    assert len(table.rows) == len(published) > 5 and r"\begin{tabular}{@{}p{" in table.latex()


def test_text_and_claims_fit_whatever_the_verdicts():
    claims = load_claims(ROOT / "paper" / "claims.yaml")
    found = judge_claims(claims, ROOT / "results")
    assert text_faults(claims, found, ROOT / "paper" / "sections") == []
