"""The same grid on a Ray cluster of two nodes on this machine; skipped where the extra `ray` is absent."""

import os
import sys
import threading
from pathlib import Path

import grid_fakes
import pytest
from test_runs import calls, settings
from together import a_run

from vqlora.base import tiny
from vqlora.config import ConfigError
from vqlora.data.kinemoji.language import vocabulary
from vqlora.data.kinemoji.write import write_domain
from vqlora.experiments import Profile
from vqlora.grid.cluster import _made
from vqlora.runs import GridError, RunStore, run_grid


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=r"cluster: 'auto' needs Ray: pip install 'vqlora\[ray\]'"):
        run_grid([settings()], RunStore(tmp_path), execute=grid_fakes.quick, compute_dtype="fp32",
                 cluster="auto")  # fmt: skip


def test_a_node_that_differs_refuses_a_run_and_says_why(tmp_path):
    def made(data: Path, wanted: str) -> str:
        root, modules = str(tmp_path), ["grid_fakes"]
        return _made("k", settings(), "c", root, str(data), grid_fakes.quick, modules, wanted)[0]

    assert "elsewhere: is not there on node" in made(tmp_path / "elsewhere", "x")
    assert "has another version of vqlora" in made(tmp_path, "x")
    assert RunStore(tmp_path).get("k") is None


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a CPU each, and this process as their driver."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    two.add_node(num_cpus=1)
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    yield two
    ray.shutdown()
    two.shutdown()


def on_cluster(cluster, wanted, root: Path, execute=grid_fakes.quick):
    (root / "data").mkdir(parents=True, exist_ok=True)
    profile = Profile(name="p", cluster=cluster.address)
    return run_grid(wanted, RunStore(root), profile, execute=execute, compute_dtype="fp32", code="c")


def test_results_are_those_of_the_pool_and_nothing_finished_is_made_again(cluster, tmp_path):
    wanted = [settings(2), settings(0), settings(1), settings(0, experiment="other")]
    found = on_cluster(cluster, wanted, tmp_path / "ray")
    (tmp_path / "pool" / "data").mkdir(parents=True)
    pool = run_grid(wanted, RunStore(tmp_path / "pool"), 2, execute=grid_fakes.quick, compute_dtype="fp32",
                    code="c")  # fmt: skip
    assert [(run.key, run.metrics) for run in found] == [(run.key, run.metrics) for run in pool]
    on_cluster(cluster, [*wanted, settings(3)], tmp_path / "ray")
    assert calls(tmp_path / "ray") == [f"e/d/lora-bf16/seed{seed}" for seed in range(4)], "each once"


def test_a_trained_run_comes_out_the_same_to_the_last_bit(cluster, tmp_path):
    model, tokenizer = tiny(words=vocabulary())
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    write_domain(tmp_path / "data", "visual", {"train": 4, "val": 4}, 0, 1, progress=False)
    wanted = [a_run(tmp_path)]
    (ours,) = run_grid(wanted, RunStore(tmp_path / "pool"), 1, data_root=tmp_path / "data")
    profile = Profile(name="p", cluster=cluster.address)
    (theirs,) = run_grid(wanted, RunStore(tmp_path / "ray"), profile, data_root=tmp_path / "data")
    assert ours.key == theirs.key and repr(ours.metrics) == repr(theirs.metrics)
    assert ours.examples().equals(theirs.examples())


def test_a_killed_worker_costs_its_run_a_second_try_and_no_other_run(cluster, tmp_path):
    with pytest.raises(GridError) as fault:
        on_cluster(cluster, [settings(seed) for seed in range(5)], tmp_path, grid_fakes.faulty)
    assert "2 of 5 runs failed" in str(fault.value) and "\n" not in str(fault.value)
    assert "seed1 (ValueError: the loss is not a number)" in str(fault.value)
    assert "seed2 (its process or node died, and again" in str(fault.value)
    assert calls(tmp_path) == [f"e/d/lora-bf16/seed{seed}" for seed in (0, 3, 4)], "3 was killed once"


def test_a_lost_node_costs_no_finished_run(cluster, tmp_path):
    node = cluster.add_node(num_cpus=1)
    wanted = [settings(seed) for seed in (0, 4, 5, 6, 7, 8)]
    threading.Timer(1.0, cluster.remove_node, [node]).start()
    on_cluster(cluster, wanted, tmp_path, grid_fakes.faulty)
    made = calls(tmp_path)
    assert sorted(set(made)) == sorted(run.name for run in wanted) and len(made) <= len(wanted) + 1
