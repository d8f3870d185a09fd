"""What notebook 05 makes of its runs: rates, claims, gates beside what truly happens; its settings."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from little_adapters import adapted

from vqlora import comparison
from vqlora.config import RunSettings
from vqlora.data.batches import Item
from vqlora.data.clips import Clip
from vqlora.experiments import TemporalSettings, load_profile
from vqlora.gate_runs import gate_rows
from vqlora.report.gate_plots import gate_frames, gate_gains, gate_layers
from vqlora.report.gate_tables import GATE_TABLES
from vqlora.store import StoredRun, write_csv
from vqlora.studies import gate_study

ROOT = Path(__file__).resolve().parents[1]
GATES = {
    "plain": {"gate": "none"},
    "rank": {"gate": "rank"},
    "constant": {"gate": "rank", "control": "constant"},
    "shuffled": {"gate": "rank", "control": "shuffled"},
    "mixture": {"gate": "mixture"},
    "segments": {"gate": "none", "select": "segments"},
}
ARMS = [{"label": label, "arm": "vqlora", "bits": "nf4", "learning_rate": 1e-2, "overrides": overrides}
        for label, overrides in GATES.items()]  # fmt: skip
SHAPE = {"seeds": [0, 1, 2], "steps": 4, "train_clips": 9, "eval_clips": 9}
LAYERS = (
    "model.vision_tower.layers.0.mlp.fc1",
    "model.multi_modal_projector.linear_1",
    "model.language_model.layers.0.mlp.up_proj",
)


def temporal(**more) -> TemporalSettings:
    domains = {"domains": ["inserts"], "more_domains": ["degraded"]}
    return TemporalSettings(**{**domains, "arms": ARMS, **SHAPE, **more})


class Run(StoredRun):
    """A stored run whose examples are made up when asked for: captions, and gates in two frames of a clip."""

    def examples(self) -> pd.DataFrame:
        rng = np.random.default_rng(self.settings.seed)
        said = pd.DataFrame({"clip": [f"c{i}" for i in range(40)], "task": "caption", "id": "x"})
        said["nll"] = self.metrics["nll"] + rng.normal(0, 0.01, 40)
        if self.settings.gate == "none":
            return said
        rows = pd.DataFrame({"clip": "c0", "task": "gate", "frame": [1.0, 3.0], "feature.motion": [0.0, 0.5]})
        low, high = (1.0, 1.0) if self.settings.control == "constant" else (0.4, 1.4)
        for layer in LAYERS:
            rows[f"gate.{layer}"], rows[f"active.{layer}"] = [high, low], 4.0
        return pd.concat([said, rows], ignore_index=True)


def column(examples, metric):
    rows = examples[examples["task"] == "caption"]
    return pd.DataFrame({"clip": rows["clip"], "value": rows[metric]})


def run(label, domain="inserts", nll=1.0, seed=0, **more) -> Run:
    named = {"experiment": "05_temporal", "label": label, "arm": "vqlora", "bits": "nf4", "domain": domain}
    shape = {"seed": seed, "learning_rate": 1e-2, "steps": 60, "train_clips": 10, "eval_clips": 40}
    settings = RunSettings(**{**named, **shape, **GATES[label], **more})
    return Run(f"{label}{domain}{seed}", settings, {"nll": nll}, {}, {}, None)


NLL = {"plain": 1.0, "rank": 0.8, "constant": 1.0, "shuffled": 0.79, "mixture": 0.7, "segments": 1.0}
RUNS = [run(arm, "inserts", nll, seed) for arm, nll in NLL.items() for seed in range(3)]
RUNS += [run(arm, "degraded", 1.0, seed) for arm in ("plain", "rank") for seed in range(3)]


def test_further_domains_see_the_fewer_arms_alone():
    runs = temporal().runs()
    seen = {(run.domain, run.method) for run in runs}
    assert seen == {("degraded", "plain"), ("degraded", "rank"), *(("inserts", label) for label in GATES)}
    assert len(runs) == 3 * len(seen)
    with pytest.raises(ValueError, match="fewer: 'gated' is no arm's label; allowed: plain, rank"):
        temporal(fewer=["gated"])


def test_gates_are_swept_over_both_rates_and_lend_them_to_their_controls(tmp_path):
    swept = ("plain", "rank", "mixture")
    arms = [arm | {"sweep": [1e-2, 2e-2]} if arm["label"] in swept else arm for arm in ARMS]
    asked = temporal(arms=arms, gate_rates=[1, 20])
    pairs = [(run.method, run.learning_rate, run.gate_rate) for run in asked.sweep_runs()]
    assert len(pairs) == len(set(pairs)) == 2 + 4 + 4
    assert {run.eval_part for run in asked.sweep_runs()} == {"val"}
    best = {"plain": (1e-2, 5.0), "rank": (2e-2, 20.0), "mixture": (2e-2, 1.0)}
    nll = [0.5 if tuple(rates) == best[label] else 0.9 for label, *rates in pairs]
    sweep = [
        run(label, nll=value, learning_rate=rate, gate_rate=gate_rate)
        for value, (label, rate, gate_rate) in zip(nll, pairs, strict=True)
    ]
    rates = gate_study.settle(asked, sweep, tmp_path / "swept.csv", tmp_path / "none.csv")
    found = {row.arm: (row.learning_rate, row.gate_rate, row.origin) for row in rates.fillna(0).itertuples()}
    assert found["rank"] == (2e-2, 20, "sweep") and found["plain"] == (1e-2, 0, "sweep")
    assert found["constant"] == found["shuffled"] == (2e-2, 20, "sweep of rank")
    assert found["segments"] == (1e-2, 0, "sweep of plain") and found["mixture"] == (2e-2, 1, "sweep")
    table = gate_study.sweep_table(sweep, rates, tmp_path / "none.csv")
    assert table["chosen"].sum() == 3 and set(table.loc[table["chosen"], "value"]) == {0.5}
    committed = gate_study.settle(temporal(), [], tmp_path / "own.csv", tmp_path / "swept.csv")
    assert committed.set_index("arm").loc["shuffled", "origin"] == "committed sweep of rank"
    made = {run.method: (run.learning_rate, run.gate_rate) for run in gate_study.rated(asked.runs(), rates)}
    assert made["constant"] == (2e-2, 20.0) and made["plain"] == (1e-2, 5.0)


def test_a_gain_that_shuffling_reaches_is_not_called_temporal():
    tests = gate_study.judge(temporal(), RUNS, values=column)
    verdicts = tests.set_index(["family", "domain", "comparison"])["verdict"]
    assert verdicts["primary", "inserts", "rank_vs_plain"] == "supported"
    assert verdicts["primary", "inserts", "rank_vs_constant"] == "supported"
    assert verdicts["primary", "inserts", "rank_vs_shuffled"] == "denied"
    assert verdicts["domains", "degraded", "rank_vs_plain"] == "denied", "a gain below the margin"
    assert verdicts["arms", "inserts", "mixture_vs_rank"] == "supported"
    counts = gate_study.overall(tests).set_index(["of", "metric"])["value"]
    assert counts["primary", "supported_count"] == "2" and counts["rank_vs_plain", "claims_count"] == "2"
    assert float(counts["rank_vs_plain", "largest_nll"]) == pytest.approx(0.2, abs=1e-6)
    assert counts["rank_vs_plain", "supported_names"] == counts["rank_vs_plain", "largest_name"] == "inserts"
    assert counts["rank_vs_plain", "denied_names"] == "degraded"
    assert counts["temporal", "supported_names"] == "none", "shuffled features do as much"
    assert counts["further", "claims_count"] == "0", "no control was run beyond the main domains"


def test_controls_are_judged_beyond_the_main_domains_where_they_were_run():
    domains = {"degraded": 1.0, "cutaways": 1.0}
    runs = [run(arm, domain, 0.8 if arm == "rank" and domain == "cutaways" else nll, seed)
            for domain, nll in domains.items() for seed in range(3)
            for arm in ("plain", "rank", "constant", "shuffled")]  # fmt: skip
    asked = temporal(more_domains=list(domains), fewer=["plain", "rank", "constant", "shuffled"])
    tests = gate_study.judge(asked, [*RUNS[:18], *runs], values=column)
    beyond = tests[tests["family"] == "beyond"].set_index(["domain", "comparison"])["verdict"]
    assert len(beyond) == 4 and beyond["cutaways", "rank_vs_shuffled"] == "supported"
    assert beyond["degraded", "rank_vs_constant"] == "denied"
    counts = gate_study.overall(tests).set_index(["of", "metric"])["value"]
    assert counts["further", "claims_count"] == "2" and counts["further", "supported_names"] == "cutaways"


@pytest.fixture
def written(tmp_path) -> Path:
    """Results of the invented runs, and the truth of their one clip: something moves in frame 3, 1 is odd."""
    events = [{"name": "a", "motion": "left", "start": 3, "end": 4}]
    told = {"video_id": "c0", "events": events, "frames": 5, "inserted": [1], "degraded": []}
    for domain in ("inserts", "degraded"):
        (tmp_path / domain / "annotations").mkdir(parents=True)
        (tmp_path / domain / "annotations" / "truth.jsonl").write_text(json.dumps(told) + "\n")
    out = tmp_path / "results" / "05_temporal"
    out.mkdir(parents=True)
    seen = gate_study.frames_of([r for r in RUNS if r.settings.domain == "inserts"], tmp_path)
    write_csv(out / "gates.csv", gate_study.by_layer(seen))
    write_csv(out / "curves.csv", gate_study.curves(seen, tmp_path))
    write_csv(out / "tests.csv", gate_study.judge(temporal(), RUNS, values=column))
    write_csv(out / "summary.csv", comparison.summarise(RUNS, metrics=["nll"], values=column))
    swept = [("plain", 1e-2, None, 0.5), ("rank", 1e-2, 5.0, 0.4), ("rank", 1e-2, 20.0, 0.3)]
    sweep = pd.DataFrame(swept, columns=["arm", "learning_rate", "gate_rate", "value"])
    sweep = sweep.assign(domain="inserts", metric="nll", chosen=[True, False, True])
    write_csv(out / "sweep.csv", sweep)
    return tmp_path / "results"


def test_gates_are_set_beside_what_truly_happens(written):
    layers = pd.read_csv(written / "05_temporal" / "gates.csv").set_index(["arm", "seed", "layer"])
    row = layers.loc[("rank", 0, LAYERS[0])]
    assert row["odd_gap"] == pytest.approx(1.0) and row["moving_gap"] == pytest.approx(-1.0)
    assert row["motion_corr"] == pytest.approx(-1) and row["active_mean"] == 4
    assert layers.loc[("constant", 0, LAYERS[0]), ["gate_sd", "motion_corr"]].tolist() == [0, 0]
    curves = pd.read_csv(written / "05_temporal" / "curves.csv")
    assert curves["frame"].tolist() == [0, 1, 2, 3, 4]
    assert curves.dropna(subset="vision")["frame"].tolist() == [1, 3], "gates only where a frame was shown"
    assert curves.query("odd")["frame"].tolist() == [1] and curves.query("moving")["frame"].tolist() == [3]


def test_a_part_without_gates_has_no_row(tmp_path, written):
    seen = gate_study.frames_of([r for r in RUNS if r.settings.domain == "inserts"], tmp_path)
    seen.loc[seen["arm"] == "rank", f"gate.{LAYERS[0]}"] = float("nan")
    layers = gate_study.by_layer(seen)
    assert set(layers.loc[layers["arm"] == "rank", "layer"]) == set(LAYERS[1:])
    assert set(layers.loc[layers["arm"] == "constant", "layer"]) == set(LAYERS)


def test_figures_and_tables_show_the_tests(written):
    summary = pd.read_csv(written / "05_temporal" / "summary.csv")
    counts = summary.assign(metric="trainable_parameters", value=100.0)
    write_csv(written / "05_temporal" / "summary.csv", pd.concat([summary, counts]))
    text = {name: build(written).markdown() for name, build in GATE_TABLES.items()}
    assert "Gate beats shuffled features" in text["gate_tests"]
    assert "| Degraded motion | Gate beats plain adapters |" in text["gate_tests"]
    rows = [row for row in text["gate_sweep"].splitlines() if "10^-2" in row]
    assert [row.count("--") for row in rows] == [2, 1]
    assert r"\textbf{0.300}" in GATE_TABLES["gate_sweep"](written).latex()
    assert "Two experts beats gate" not in text["gate_tests"] and "--" in text["gate_nll"]
    for draw in (gate_gains, gate_frames, gate_layers):
        assert draw(written).axes
        plt.close("all")
    figure = gate_gains(written)
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [round(float(line.get_xdata()[0]), 3) for line in lines] == [0.2]
    plt.close(figure)


@pytest.mark.parametrize("control", [None, "constant"])
def test_the_gates_of_a_model_are_read_for_every_frame(control):
    named = {"feature_names": ["motion"], "feature_mean": [0.0], "feature_std": [1.0]}
    model = adapted(gate="rank", control=control, **named)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_gate" in name:  # every gate: 2 sigmoid(h tanh(motion))
                value.fill_(1.0 if name.endswith("weight") else 0.0)
    size = model.config.image_size
    frames = np.zeros((3, size, size, 3), np.uint8)
    frames[2] = 255
    clip = Clip("c", Path("c.mp4"), "test", {"en": ("a",)}, (), (), ())
    item = Item(clip, frames, np.array([0.0, 0.5, 1.0], np.float32), 0, 0)
    table = gate_rows(model, [item, item], {"c": 41})
    assert table["frame"].tolist() == [0, 20, 40] * 2 and set(table["task"]) == {"gate"}
    opened = table[[name for name in table if name.startswith("gate.")]]
    assert len(opened.columns) > 3 and (opened.iloc[2] > 1.5).all()
    assert np.allclose(opened.iloc[:2], 1) if control is None else np.allclose(opened, opened.iloc[0])
    assert np.allclose(table["feature.motion"], [0, 0, 1] * 2, atol=1e-6)
    assert np.allclose(table[[name for name in table if name.startswith("active.")]], 4, atol=1e-3)


@pytest.mark.parametrize("name", ["smoke", "cpu", "full"])
def test_profiles_hold_the_controls_at_one_rank(name):
    asked = load_profile(name, ROOT).temporal
    runs = asked.runs()
    assert {"plain", "rank", "constant", "shuffled"} <= {run.method for run in runs}
    assert len({(run.rank, run.alpha, run.batch_size, run.steps, run.bits) for run in runs}) == 1
    assert not {run.seed for run in asked.sweep_runs()} & {run.seed for run in runs}
