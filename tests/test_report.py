"""Keys, tables and figures: from results files alone, always the same bytes, one clear line for bad files."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from invented_results import write_invented

from vqlora.report.cells import Table, plain
from vqlora.report.keys import (
    ResultsError,
    collect,
    format_interval,
    format_number,
    kind,
    results_id,
    write_keys,
)
from vqlora.report.tables import TABLES, main_table, write_tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return write_invented(tmp_path_factory.mktemp("report") / "results")


def test_report_imports_no_torch():
    code = (
        "import sys, vqlora.report.keys, vqlora.report.tables, vqlora.report.plots, vqlora.report.paper; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.8521, "slot_frac", r"85.2\%"),
        (0.5, "t2v_r1", r"50.0\%"),
        (1.234, "cider", "123.4"),
        (0.7421, "nll", "0.742"),
        (-0.0055, "nll", r"\ensuremath{-}0.005"),
        (-0.0001, "nll", "0.000"),
        (119.5e6, "train_bytes", "119.5~MB"),
        (2.5e9, "train_bytes", "2.5~GB"),
        (2.5e11, "step_flops", "250.0~GFLOP"),
        (12, "wall_s", "12.0~s"),
        (0.0123, "latency_s", "12.3~ms"),
        (600, "wall_s", "10.0~min"),
        (3400000, "trainable_parameters", r"3\,400\,000"),
        (0.0002, "p_holm", r"\ensuremath{<}0.001"),
        (0.04, "p", "0.040"),
        (4e-3, "learning_rate", r"\ensuremath{4\times10^{-3}}"),
        (1e-2, "learning_rate", r"\ensuremath{10^{-2}}"),
        (float("nan"), "nll", "n/a"),
        ("supported", "verdict", "supported"),
        ("a_b & c%", "note", r"a\_b \& c\%"),
    ],
)
def test_a_number_is_printed_by_its_kind(value, metric, text):
    assert format_number(value, metric) == text


def test_interval_uses_the_format_of_its_metric_without_unit():
    assert format_interval(0.801, 0.899, "qa_frac") == "[80.1, 89.9]"
    assert format_interval(float("nan"), 1.0, "qa_frac") == ""
    assert kind("qa_order_frac") == "percent" and kind("t2v_median_rank") == "number"


def test_keys_follow_from_folder_file_row_and_metric(results):
    keys = collect(results)
    assert keys["main.language.qlora.nll"].text == "0.748"
    assert keys["main.language.qlora.nll"].interval == "[0.725, 0.770]"
    assert keys["main.tests.visual.qlora_vs_lora.nll.verdict"].text == "undecided"
    assert keys["main.tests.visual.qlora_vs_lora.nll.margin"].text == "0.030"
    assert keys["main.settings.seeds"].text == "3"
    assert "main.language.frozen.train_bytes" not in keys, "an empty cell is no number"
    assert list(keys) == sorted(keys)


def test_a_key_is_refused_twice_and_with_characters_latex_cannot_read(tmp_path):
    folder = tmp_path / "05_more"
    folder.mkdir()
    file = folder / "summary.csv"
    file.write_text("arm,metric,value\nqlora,nll,1\nqlora,nll,2\n")
    with pytest.raises(ResultsError, match=r"more\.qlora\.nll.*twice"):
        collect(tmp_path)
    file.write_text("arm,metric,value\nq{lora,nll,1\n")
    with pytest.raises(ResultsError, match=r"summary\.csv: key 'more\.q\{lora\.nll'"):
        collect(tmp_path)
    file.write_text("arm,metric,value\nqlora,nll\n")
    with pytest.raises(ResultsError, match="line 2: 3 columns expected"):
        collect(tmp_path)


def test_keys_file_is_deterministic_and_stamped(results, tmp_path):
    first = write_keys(results, tmp_path / "a", "cpu") and (tmp_path / "a" / "keys.tex").read_bytes()
    write_keys(results, tmp_path / "b", "cpu")
    assert first == (tmp_path / "b" / "keys.tex").read_bytes()
    assert rb"\def\vqprofile{cpu}" in first and results_id(results).encode() in first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["keys.tex"], "no temporary file stays"


def test_results_id_changes_with_one_cell(tmp_path):
    folder = write_invented(tmp_path / "results")
    before = results_id(folder)
    file = folder / "03_main" / "summary.csv"
    file.write_text(file.read_text().replace("4.2,", "4.3,", 1))
    assert results_id(folder) != before


def test_tables_are_complete_and_deterministic(results, tmp_path):
    written = write_tables(results, tmp_path / "a")
    write_tables(results, tmp_path / "b")
    assert {path.stem for path in written} == set(TABLES)
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        text = path.read_text()
        assert "nan" not in text.lower()
        if path.suffix == ".tex":
            rows = [line for line in text.splitlines() if line.endswith(r"\\")]
            assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1, path.name


def test_main_table_holds_every_arm_with_its_interval(results):
    table = main_table(results)
    text = table.latex()
    assert text.count("QLoRA, NF4 & 0.748") == 1 and text.count("QLoRA, NF4 & 1.147") == 1
    assert "[0.725, 0.770]" in text and r"5.7\%" in text and "119.5~MB" in text
    assert text.index("Language shift") < text.index("Visual shift")
    frozen = next(row for row in table.rows if row and row[0] == "Frozen")
    assert frozen[7] == "--", "the frozen arm has no training step"


def test_chosen_learning_rate_is_bold(results):
    text = TABLES["sweep"](results).latex()
    assert r"\textbf{0.748}" in text and text.count(r"\textbf") == 6


def test_markdown_has_no_latex_left(results):
    text = "".join(table(results).markdown() for table in TABLES.values())
    assert "\\" not in text.replace("\\|", "") and "{" not in text and "~" not in text
    assert plain(r"\ensuremath{4\times10^{-3}}") == "4×10^-3" and plain(r"\ensuremath{-}0.005") == "-0.005"
    assert Table(("A", "B"), (("x", r"85.2\%"),)).markdown() == "| A | B |\n|---|---:|\n| x | 85.2% |\n"


def test_missing_file_and_missing_column_are_named(results, tmp_path):
    with pytest.raises(ResultsError, match=r"03_main/summary\.csv: missing; `make 03` writes it"):
        main_table(tmp_path)
    (tmp_path / "03_main").mkdir()
    pd.DataFrame({"domain": ["language"], "arm": ["lora"]}).to_csv(
        tmp_path / "03_main" / "summary.csv", index=False
    )
    with pytest.raises(ResultsError, match=r"summary\.csv: no column metric, value, low, high"):
        main_table(tmp_path)
    with pytest.raises(ResultsError, match="no results here"):
        collect(tmp_path / "nowhere")


def test_figures_are_complete_and_byte_identical(results, tmp_path):
    import matplotlib.pyplot as plt

    from vqlora.report.plots import FIGURES, STYLE, save_figure, write_figures

    written = write_figures(results, tmp_path / "a")
    assert {path.name for path in written} == {
        f"{name}.{form}" for name in FIGURES for form in ("pdf", "png")
    }
    assert not any(b"CreationDate" in path.read_bytes() for path in written)
    for name in ("quality_memory", "rank_layers", "sample_sheet"):  # drawn again: lines, an image, clips
        with plt.style.context(["default", str(STYLE)]):
            again = save_figure(FIGURES[name](results), tmp_path / "b" / name)
        for path in again:
            assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name


def test_quality_memory_shows_value_memory_and_interval_of_each_arm(results):
    import matplotlib.pyplot as plt

    from vqlora.report.plots import quality_memory

    figure = quality_memory(results)
    left = figure.axes[0]
    points = {
        line.get_xdata()[0]: line.get_ydata()[0] for line in left.get_lines() if line.get_marker() in "D^o"
    }
    assert points == {161.4: 0.68, 122.25: 0.742, 119.5: 0.7475}
    segments = [bar.get_segments()[0][:, 1].tolist() for bar in left.collections]
    assert [pytest.approx([0.97 * y, 1.03 * y]) for y in points.values()] == segments
    assert "MB" in left.get_xlabel()
    plt.close(figure)


def test_the_method_figure_shows_the_sample_clip_and_needs_no_result(tmp_path):
    import matplotlib.pyplot as plt

    from vqlora.report.plots import method
    from vqlora.report.samples import read_samples

    (tmp_path / "01_data").mkdir()
    for name in ("samples.csv", "samples.png"):
        shutil.copy(ROOT / "results" / "01_data" / name, tmp_path / "01_data")
    clip = read_samples(tmp_path).frames("cutaways")
    figure = method(tmp_path)
    shown = [np.asarray(image.get_array()) for image in figure.axes[0].images]
    whole = [sum(np.array_equal(picture, frame) for picture in shown) for frame in clip]
    assert sorted(whole) == [0, 0, 0, 0, 2, 2, 2, 2], "chosen frames: in the strip and beside their gates"
    plt.close(figure)


def test_sample_sheet_refuses_a_picture_that_does_not_fit(tmp_path):
    from vqlora.report.plots import sample_sheet

    folder = write_invented(tmp_path / "results")
    file = folder / "01_data" / "samples.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    with pytest.raises(ResultsError, match=r"samples\.png: 704 pixel rows do not divide into the 3 clips"):
        sample_sheet(folder)


def test_a_profile_without_a_sweep_still_gets_its_table(tmp_path):
    folder = write_invented(tmp_path / "results")
    file = folder / "03_main" / "sweep.csv"
    frame = pd.read_csv(file)
    frame[frame["chosen"]].assign(value=float("nan")).to_csv(file, index=False)
    assert r"\textbf{n/a}" in TABLES["sweep"](folder).latex()
    assert not [key for key in collect(folder) if key.startswith("main.sweep.") and key.endswith(".nll")]
