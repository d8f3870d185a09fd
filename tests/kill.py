"""Kill real work at random moments, run the same command again, and compare what comes out bit by bit.

    python tests/kill.py --n 30 --seed 0

A command works on a tiny model in a process group of its own: one run of a grid (trains, saves, evaluates),
rendering of clips, or pretraining of a base. What it writes tells which phase it is in; somewhere in the
wanted phase it is killed, most often with SIGKILL, else with SIGTERM: the group, or its first process alone.
Then the same command is run until it succeeds. Its result must be that of a command nobody disturbed: the
metrics, the numbers of every example and the costs that depend on no clock; the bytes of every rendered file;
the weights and the losses of the base.

Outcomes: `same`, `DIFFERENT`, `FAILED` (not done after three more tries); the exit code is 1 unless all are
the same. `--light` leaves out METEOR, whose Java takes ten seconds to start, and makes every command a fork
of a process that has imported all, as the tests do. `--csv` keeps the counts.
"""
import argparse
import collections
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

STEPS = 25  # saved after 20, as `vqlora.train.train` does, and at the end
POLL_S = 0.003
DOMAIN, CLIPS = "visual", {"train": 8, "val": 4}
OUTCOMES = ("same", "DIFFERENT", "FAILED")
CLOCK = ("_s", "_here", "resident_peak_bytes")  # costs that differ from run to run end so


# -- commands, each of which may be run again on what a killed one left


def fine_tune(inputs: Path, out: Path, light: bool) -> None:
    """One run of a grid, as `vqlora run` makes it; in a worker process of its own unless `light`."""
    from vqlora.config import RunSettings
    from vqlora.runs import run_grid
    from vqlora.store import RunStore
    judged = {"judge": ("uniform", "random"), "judge_frames": (2, 4)} if light else {}
    settings = RunSettings(
        experiment="kill", arm="vqlora", bits="nf4", domain=DOMAIN, seed=0, rank=4, dropout=0.1, frames=2,
        layers="attention", modalities=("vision", "text"), learning_rate=1e-2, steps=STEPS, batch_size=2,
        train_clips=CLIPS["train"], eval_clips=CLIPS["val"],
        base=str(inputs / "base"), compute_dtype="fp32", **judged)  # fmt: skip
    run_grid([settings], RunStore(out), 0 if light else 1, data_root=inputs)


def render(inputs: Path, out: Path, light: bool) -> None:
    from vqlora.data.kinemoji.write import write_domain
    write_domain(out, DOMAIN, {"train": 20 if light else 100}, 1, 1 if light else 2, progress=False)


def pretrain(inputs: Path, out: Path, light: bool) -> None:
    """A base, as notebook 02 trains it: in two processes; `light` does in this one what they do."""
    from vqlora import pretrain as training
    from vqlora.config import PretrainSettings
    tiny = {"width": 64, "layers": 1, "vision_width": 64, "vision_layers": 1, "frames": (3,)}
    recipe = PretrainSettings(steps=12, vision_steps=4, batch_size=4, warmup_steps=1, save_steps=4,
                              processes=1 if light else 2, vision_frames=2, **tiny)
    if not light:
        training.pretrain(recipe, out)
    elif not (out / "model" / "done").is_file():
        training.begin(recipe, out)
        training.work(out)
        (out / "model" / "done").touch()


def run_result(out: Path) -> dict[str, object]:
    [path] = (out / "runs").glob("*.json")
    record = json.loads(path.read_text())
    cost = {name: value for name, value in record["cost"].items() if not name.endswith(CLOCK)}
    return {"metrics": record["metrics"], "cost": cost} | hashes(out / "runs" / "examples")


def base_result(out: Path) -> dict[str, object]:
    rows = json.loads((out / "log.json").read_text())
    found = {"losses": [row["loss"] for row in rows if "loss" in row]} | hashes(out / "model")
    return found | {path.name: hashes(path)["model.safetensors"] for path in saves(out)}  # in float32


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


COMMANDS: dict[str, tuple[Callable, Callable]] = {
    "run": (fine_tune, run_result),
    "render": (render, lambda out: hashes(out / DOMAIN)),
    "pretrain": (pretrain, base_result),
}


# -- phases, by what has been written


def saves(out: Path) -> list[Path]:
    return [*out.glob("work/*/checkpoints/checkpoint-*"), *out.glob("checkpoints/checkpoint-*")]


def half_saved(out: Path) -> bool:
    return any(not (path / "complete.json").exists() for path in saves(out))


def trained(out: Path) -> bool:
    return any((path / "complete.json").exists() for path in saves(out) if path.name == f"checkpoint-{STEPS}")


def stored(out: Path) -> bool:
    return any(out.glob("runs/*.json"))


PHASES: dict[str, tuple[str, Callable[[Path], bool]]] = {  # the first that holds is the one it is in
    "saving": ("run", half_saved),
    "saving the base": ("pretrain", half_saved),
    "evaluating": ("run", lambda out: trained(out) and not stored(out)),
    "training": ("run", lambda out: any(out.glob("work/*/tensorboard/*"))
                 and not (trained(out) or stored(out))),
    "rendering": ("render", lambda out: (out / DOMAIN / "rendered.jsonl").exists()
                  and not (out / DOMAIN / "annotations" / "truth.jsonl").exists()),
    "pretraining": ("pretrain", lambda out: (out / "checkpoints").is_dir()
                    and not (out / "model" / "done").exists()),
}  # fmt: skip
ORDER = ("training", "saving", "evaluating", "rendering", "pretraining",
         "training", "saving", "evaluating", "rendering", "saving the base")


def phase_of(command: str, out: Path) -> str:
    names = (name for name, (its, holds) in PHASES.items() if its == command and holds(out))
    return next(names, "before" if not out.exists() or not any(out.iterdir()) else "between")


# -- starting and killing


class Started:
    """A command in a session, and so in a process group, of its own."""

    def __init__(self, command: str, inputs: Path, out: Path, light: bool) -> None:
        out.mkdir(exist_ok=True)
        if light:
            context = multiprocessing.get_context("forkserver")
            self._child = context.Process(target=_forked, args=(command, inputs, out))
            self._child.start()
        else:
            line = [sys.executable, __file__, "--command", command, str(inputs), str(out)]
            with (out.parent / f"{out.name}.log").open("ab") as log:
                self._child = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        self.pid = self._child.pid

    def ended(self) -> bool:
        running = getattr(self._child, "is_alive", None)
        return not running() if running else self._child.poll() is not None

    def wait(self) -> int:
        """The exit code, minus the signal's number for one that was killed."""
        if isinstance(self._child, subprocess.Popen):
            return self._child.wait()
        self._child.join()
        return self._child.exitcode

    def kill(self, number: int, group: bool) -> None:
        (os.killpg if group else os.kill)(self.pid, number)


def _forked(command: str, inputs: Path, out: Path) -> None:
    os.setsid()
    with (out.parent / f"{out.name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    COMMANDS[command][0](inputs, out, True)


def episodes(started: Started, holds: Callable[[], bool]) -> Iterator[bool]:
    """True whenever the phase begins and False whenever it is over, until the command ends."""
    inside = False
    while not started.ended():
        if holds() != inside:
            inside = not inside
            yield inside
        time.sleep(POLL_S)


def lengths(started: Started, phases: dict[str, Callable[[], bool]]) -> dict[str, list[float]]:
    """Seconds of each stretch of each phase of a command that nobody disturbs."""
    found: dict[str, list[float]] = {name: [] for name in phases}
    inside: dict[str, float] = {}
    while not started.ended():
        for name, holds in phases.items():
            now, held = time.monotonic(), holds()
            if held and name not in inside:
                inside[name] = now
            elif not held and name in inside:
                found[name].append(now - inside.pop(name))
        time.sleep(POLL_S)
    for name, since in inside.items():
        found[name].append(time.monotonic() - since)
    return found


def strike(started: Started, holds: Callable[[], bool], stretch: int, delay_s: float, number: int,
           group: bool) -> bool:
    """Send the signal `delay_s` into the phase's `stretch`-th stretch; False if the command was faster."""
    for inside in episodes(started, holds):
        stretch -= inside
        if inside and stretch < 0:
            time.sleep(delay_s)
            break
    if started.ended():
        return False
    started.kill(number, group)
    return started.wait() == -number


@contextmanager
def ready(light: bool) -> Iterator[Path]:
    """A folder with what all commands read: a tiny base and rendered clips."""
    if light:
        os.environ["OMP_NUM_THREADS"] = "1"
        here = str(Path(__file__).parent)  # the server is told nothing of sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm"])
    from vqlora.base import tiny
    from vqlora.data.kinemoji.language import vocabulary
    from vqlora.data.kinemoji.write import write_domain
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model, tokenizer = tiny(words=vocabulary())
        model.save_pretrained(Path(folder, "base"))
        tokenizer.save_pretrained(Path(folder, "base"))
        write_domain(Path(folder), DOMAIN, CLIPS, 0, 1, progress=False)
        yield Path(folder)


def whole(command: str, inputs: Path, light: bool) -> tuple[dict, dict[str, list[float]]]:
    """(result, seconds of each phase's stretches) of a command that nobody disturbs."""
    out = inputs / f"{command}-whole"
    own = {name: functools.partial(holds, out) for name, (its, holds) in PHASES.items() if its == command}
    started = Started(command, inputs, out, light)
    found = lengths(started, own)
    if started.wait():
        raise RuntimeError(f"{command} fails undisturbed: {(inputs / f'{out.name}.log').read_text()[-2000:]}")
    return COMMANDS[command][1](out), found


def trial(number: int, seed: int, phase: str, known: tuple[dict, dict], inputs: Path, light: bool) -> tuple:
    """(phase, where it was hit, signal, whom, outcome) of one kill and what followed."""
    rng = np.random.default_rng([seed, number])
    command, holds = PHASES[phase]
    (right, stretches), outcome = known, "FAILED"
    sent = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
    group = bool(rng.random() < 0.75)
    for attempt in range(10):
        stretch = int(rng.integers(len(stretches[phase])))
        out = inputs / f"{number}-{attempt}"
        started = Started(command, inputs, out, light)
        delay_s = rng.random() ** 2 * stretches[phase][stretch]  # early rather than too late
        if strike(started, functools.partial(holds, out), stretch, delay_s, sent, group):
            break
    else:
        raise RuntimeError(f"{phase}: the command was ten times faster than the kill")
    landed = phase_of(command, out)
    for _ in range(3):
        if Started(command, inputs, out, light).wait() == 0:
            outcome = "same" if COMMANDS[command][1](out) == right else "DIFFERENT"
            break
    return phase, landed, sent.name, "group" if group else "first process", outcome


def kills(n: int, seed: int, light: bool) -> Iterator[tuple]:
    """`n` trials, phase after phase in turn."""
    with ready(light) as inputs:
        known = functools.cache(functools.partial(whole, inputs=inputs, light=light))
        for number in range(n):
            phase = ORDER[number % len(ORDER)]
            yield trial(number, seed, phase, known(PHASES[phase][0]), inputs, light)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=30, help="kills (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="forks instead of fresh processes, no METEOR")
    parser.add_argument("--csv", metavar="FILE", help="write all counts there")
    parser.add_argument("--command", nargs=3, metavar=("NAME", "INPUTS", "OUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.command:
        name, inputs, out = chosen.command
        COMMANDS[name][0](Path(inputs), Path(out), False)
        return 0
    counts: collections.Counter = collections.Counter()
    began = time.monotonic()
    for *hit, outcome in kills(chosen.n, chosen.seed, chosen.light):
        print(*hit, outcome, sep=", ", flush=True)
        counts[*hit, outcome] += 1
    print(f"{chosen.n} kills, seed {chosen.seed}, {time.monotonic() - began:.0f} s")
    if chosen.csv:
        write_counts(Path(chosen.csv), counts)
    return int(any(outcome != "same" for *_, outcome in counts))


def write_counts(path: Path, counts: collections.Counter) -> None:
    """One row for each phase aimed at, phase hit, signal and whom it was sent to."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["aimed_at", "hit", "signal", "whom", *(outcome.lower() for outcome in OUTCOMES)])
        for hit in sorted({tuple(hit) for *hit, _ in counts}):
            rows.writerow([*hit, *(counts[*hit, outcome] for outcome in OUTCOMES)])


if __name__ == "__main__":
    sys.exit(main())
