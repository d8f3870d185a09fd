"""What is tried on a GPU is tried here on CPU as far as that goes; without the file, papers say 'not run'."""

import pandas as pd
import pytest
import torch

from vqlora import cli
from vqlora.gpu_check import CHECKS, check_gpu
from vqlora.report.keys import collect, gpu_status
from vqlora.report.readme import gpu_table
from vqlora.store import write_csv


def test_without_cuda_it_ends_with_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert cli.main(["gpu-check"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "finds no CUDA device" in shown.err


def test_the_checks_hold_on_cpu_but_for_those_of_the_card(tmp_path):
    table = check_gpu("cpu").set_index("name")
    assert list(table.index) == list(CHECKS)
    of_the_card = {"card_memory", "paged_optimizer_state", "memory_counter"}
    assert set(table.index[table.status == "ok"]) >= set(CHECKS) - of_the_card, table.status
    assert "no paging without CUDA" in table.status["paged_optimizer_state"]
    write_csv(tmp_path / "gpu_check.csv", table.reset_index())
    held = int((table.status == "ok").sum())
    assert gpu_status(tmp_path / "gpu_check.csv") == f"{held} of {len(CHECKS)} checks held"
    assert "| nf4 error |" in gpu_table(tmp_path).markdown()


def test_as_long_as_nobody_ran_it_papers_say_so(tmp_path):
    assert collect(tmp_path)["gpu.status"].text == "not run" and "not run" in gpu_table(tmp_path).markdown()
    row = {"name": ["x"], "value": [1.0], "unit": [""], "status": ["ok"]}
    pd.DataFrame(row).to_csv(tmp_path / "gpu_check.csv")
    assert collect(tmp_path)["gpu.status"].text == "1 of 1 checks held"


def test_a_check_that_fails_is_a_row_and_stops_no_other(monkeypatch):
    kept = {"nf4_error": CHECKS["nf4_error"], "broken": ("", lambda device: 1 / 0)}
    monkeypatch.setattr("vqlora.gpu_check.CHECKS", kept)
    assert check_gpu("cpu").status.tolist() == ["ok", "ZeroDivisionError: division by zero"]
