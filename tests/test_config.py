"""Settings files: what is read, and how each kind of mistake is named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqlora.config import ConfigError, RunSettings, load_run, swept_rates
from vqlora.experiments import load_profile
from vqlora.settings_file import read_mapping

ROOT = Path(__file__).resolve().parents[1]
RUN = {
    "experiment": "e",
    "arm": "lora",
    "bits": "bf16",
    "domain": "d",
    "seed": 0,
    "learning_rate": 1e-3,
    "steps": 4,
    "train_clips": 8,
    "eval_clips": 8,
}


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as fault:
        load_profile(path)
    return str(fault.value)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (ROOT / "configs" / "cpu.yaml").read_text()
    assert old in text
    path = tmp_path / "cpu.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_committed_profile_is_valid_and_compares_all_arms_on_all_domains(name):
    profile = load_profile(name, ROOT)
    compared = [profile.main] if profile.main else [*profile.hub, *profile.confirm]
    assert compared
    for main in compared:
        runs = main.runs()
        told_apart = {run.model_dump_json() for run in runs}
        assert len(runs) == len(told_apart) == len(main.domains) * len(main.arms) * len(main.seeds)
        assert {run.seed for run in main.sweep_runs()}.isdisjoint(main.seeds)
        assert all(run.eval_part == "val" for run in main.sweep_runs())


def test_smoke_stays_out_of_figures_and_paper():
    assert not load_profile("smoke", ROOT).in_place
    assert load_profile("cpu", ROOT).in_place


@pytest.mark.parametrize(
    "old, new, wanted",
    [
        ("seeds: [0, 1, 2]", "seeds: [0, x, 2]", "main.seeds[1]: 'x' is not an integer"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1.5]", "main.seeds[1]: 1.5 is not an integer"),
        ("seeds: [0, 1, 2]", "seeds: [0, '1']", "main.seeds[1]: '1' is not an integer"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "main: seeds: 0 given twice"),
        ("workers: 2", "workers: 0", "workers: 0 is not at least 1"),
        (
            "workers: 2",
            "wrkers: 2",
            "unknown key 'wrkers' (did you mean 'workers'?); allowed: name, in_place, data",
        ),
        (
            "bits: nf4",
            "bits: nf5",
            "main.arms[3].bits: 'nf5' is not one of nf4, fp4, int8, bf16 (did you mean 'nf4'?)",
        ),
        (
            "arm: qlora, bits: nf4",
            "arm: qlora, bits: bf16",
            "main.arms[3]: bits: 'bf16' does not go with arm 'qlora'; allowed: nf4, fp4, int8",
        ),
        ("pretrain: false", "pretrain: no", "base.pretrain: 'no' is not true or false"),
        (
            "eval_clips: 256",
            "eval_clips: 257",
            "main.eval_clips: 257 is more than data.domains.language.test (256)",
        ),
        (
            "[language, visual]",
            "[language, audible]",
            "main.domains: 'audible' is not in data.domains; allowed: source",
        ),
        ("eval_part: test", "eval_part: train", "main.eval_part: 'train' is not one of val, devtest, test"),
        (
            "languages: [en, es",
            "languages: [no, es",
            "data.languages[0]: 'no' is not one of en, es, de, fr, zh",
        ),
        (
            "  arms:",
            "  overrides: {rnk: 3}\n  arms:",
            "main: overrides: unknown key 'rnk' (did you mean 'rank'?)",
        ),
        (
            "  arms:",
            "  overrides: {seed: 3}\n  arms:",
            "main: overrides: 'seed' is set by the comparison itself",
        ),
        ("workers: 2", "workers: 2\nworkers: 3", "key 'workers' is given twice"),
        ("workers: 2", "workers: [2", "not YAML"),
    ],
)
def test_a_mistake_gives_one_line_with_file_key_value_and_what_is_allowed(tmp_path, old, new, wanted):
    path = changed(tmp_path, old, new)
    lines = message(path).splitlines()
    assert any(line.startswith(f"{path}: ") and wanted in line for line in lines), lines


def test_every_mistake_in_a_file_is_reported_at_once(tmp_path):
    path = changed(tmp_path, "seeds: [0, 1, 2]", "seeds: [0, x, 2.5]")
    assert len(message(path).splitlines()) == 2


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert message(tmp_path / "gone.yaml") == f"{tmp_path / 'gone.yaml'}: no such file"
    for name, data, wanted in (
        ("a.yaml", b"- 1\n", "holds a list"),
        ("b.json", b"{", "line 1: not JSON"),
        ("c.yaml", b"x: \xff", "not UTF-8"),
        ("d.yaml", b"", "holds nothing"),
    ):
        (tmp_path / name).write_bytes(data)
        assert wanted in message(tmp_path / name)
    wanted = r"profile 'cpuu' is not known \(did you mean 'cpu'\?\); allowed: confirm, cpu, full"
    with pytest.raises(ConfigError, match=wanted):
        load_profile("cpuu", ROOT)


def test_a_run_is_read_the_same_from_yaml_and_json(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "run.yaml").write_text("\n".join(f"{key}: {value}" for key, value in RUN.items()))
    assert load_run(tmp_path / "run.json") == load_run(tmp_path / "run.yaml") == RunSettings(**RUN)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e6))
def test_any_number_survives_yaml_in_the_way_python_writes_it(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(f"a: {value!r}\nb: {value:.3e}\nc: {int(value)}\n")
    read = read_mapping(path)
    assert read["a"] == value and read["b"] == float(f"{value:.3e}") and read["c"] == int(value)
    assert isinstance(read["a"], float) and isinstance(read["c"], int)


def test_swept_rates_are_read_by_arm(tmp_path):
    path = tmp_path / "lr.csv"
    path.write_text("arm,bits,learning_rate\nlora,bf16,0.5\n")
    assert swept_rates(path) == {"lora-bf16": 0.5}
    assert swept_rates(tmp_path / "none.csv") == {}
    path.write_text("arm,bits,learning_rate\nlora,bf16,fast\n")
    with pytest.raises(ConfigError, match=r"lr\.csv:2: .*'fast'"):
        swept_rates(path)


def test_settings_are_values():
    assert RunSettings(**RUN) == RunSettings(**RUN) and hash(RunSettings(**RUN)) == hash(RunSettings(**RUN))
    with pytest.raises(ValueError, match="frozen"):
        RunSettings(**RUN).seed = 2
