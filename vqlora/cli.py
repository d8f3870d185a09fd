"""The `vqlora` command: thin, over the library's own functions. Errors are one line and exit code 1."""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from vqlora.config import ConfigError, load_run
from vqlora.console import duration, lock, say
from vqlora.data.command import data_options
from vqlora.report import command as paper

EXAMPLES = """examples:
  vqlora list                              what each notebook shows and what it costs
  vqlora notebook 03 --profile cpu         make what notebook 03 needs, then notebook 03
  vqlora run my_run.yaml --profile smoke   one fine-tuning run from a settings file
  vqlora pdf --profile cpu                 the paper from results that are there
  vqlora verify --profile cpu              those results against the reference, and each claim's verdict
  vqlora accept 03 --profile full          make notebook 03's results the reference
  vqlora audit my_model --batch batch.pt   what a saved model really is, layer by layer, and its silent faults
  vqlora select clip.mp4 -k 8 --sheet s.png   which 8 frames show what happens, and a picture of why
  vqlora plan my_model --batch 4 --card 24GB   memory of fine-tuning, before anything is loaded
  vqlora card adapters/MODEL               write the model card of a saved model
  vqlora data check msrvtt --root DIR      what a data set's folder must hold, and what is missing
  vqlora data example my_clips             20 clips with captions, to copy from for one's own
"""


PLAN_EXAMPLE = """examples:
  vqlora plan released --frames 8 --batch 32 --dtype fp32 --device cpu
  vqlora plan path/to/llava-onevision-7b --bits nf4 --rank 16 --frames 16 --checkpointing --card 24GB
  vqlora plan path/to/config.json --full --json
"""

BENCH_EXAMPLE = """examples:
  vqlora bench --frames 4 8 16
  vqlora bench --model SmolVLM-135M --arms qlora vqlora+lean full --frames 16 --csv results/bench
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return chosen.command(chosen)
    except KeyboardInterrupt:
        say("interrupted; what was finished is stored, the same command goes on from there")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as fault:
        if not _expected(fault):
            raise
        say(f"vqlora: {fault}")
        return 1


def _expected(fault: Exception) -> bool:
    """Faults whose message is made for the user; any other is a mistake of ours and shows its traceback."""
    from vqlora.notebooks import NotebookError
    reported = {"GridError", "StoreError", "PaperError", "ResultsError", "AuditError", "VideoError",
                "SelectError", "FormatError", "RenderError", "LaunchError", "WriteError"}
    return isinstance(fault, ConfigError | NotebookError) or type(fault).__name__ in reported


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vqlora", description="QLoRA for video-language models.",
                                     epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Callable, text: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=text, description=text)
        part.add_argument("--profile", default="cpu", metavar="NAME", help="file in configs/ (default: cpu)")
        part.set_defaults(command=action)
        return part

    part = command("notebook", _notebook, "make notebooks and whatever they need")
    part.add_argument("notebooks", nargs="*", metavar="NN", help="numbers, e.g. 03; all when none is given")
    part.add_argument("--force", action="store_true", help="run also what is up to date")
    part.add_argument("--pretrain", action="store_true", help="notebook 02: train the base from scratch")
    command("list", _list, "notebooks with their claims and costs")
    part = command("run", _run, "make one run and print its metrics as JSON")
    part.add_argument("settings", metavar="FILE", help="YAML or JSON with the fields of RunSettings")
    part = command("pdf", paper.pdf, "build the paper from a profile's results, or the committed `reference`")
    part.add_argument("--unverified", action="store_true", help="build it unchecked; the PDF says so")
    part = command("verify", paper.verify, "hold results against the reference, and claims against results")
    part.add_argument("--seal", action="store_true", help="first record results, figures, prose as they are")
    part.add_argument("--quick", action="store_true", help="skip what takes longer than seconds to recompute")
    part = command("accept", paper.accept, "make a notebook's results the reference")
    part.add_argument("notebook", metavar="NN", help="its number, e.g. 03")
    command("html", paper.html, "export executed notebooks to build/PROFILE/html")
    part = commands.add_parser("audit", help="table of a saved model's layers; exit code 1 on a silent fault")
    part.add_argument("folder", metavar="FOLDER", help="a model saved by vqlora, or a stock peft adapter")
    part.add_argument("--base", metavar="NAME", help="folder or hub id of the base (default: as recorded)")
    part.add_argument("--bits", metavar="BITS", help="bits of the base of a stock adapter (default: nf4)")
    part.add_argument("--batch", metavar="FILE", help="batch saved by torch.save; without one nothing is run")
    part.add_argument("--modalities", nargs="+", metavar="PART", help="parts meant to carry adapters")
    part.add_argument("--allow", nargs="+", default=(), metavar="FAULT", help="faults to accept")
    part.set_defaults(command=_audit)
    part = commands.add_parser("card", help="write the model card of a saved model",
                               description="Write README.md beside a saved model, its card: data, metrics, "
                               "bits, gates, limits, licence.")
    part.add_argument("folder", metavar="DIR", help="a model saved by vqlora")
    part.add_argument("--licence", metavar="NAME", help="of the weights (default: undecided)")
    part.set_defaults(command=_card)
    part = commands.add_parser("gpu-check", help="try what needs a GPU",
                               description="Try NF4, paged optimizer, memory counters, a checkpoint, gates "
                               "and the lean step on CUDA; exit code 1 without it or where something fails.")
    part.add_argument("--csv", type=Path, metavar="FILE",
                      help="where the findings go (default: results/gpu_check.csv)")
    part.set_defaults(command=_gpu_check)
    data_options(commands.add_parser("data", help="check a data set's folder; write an example of one's own"))
    _plan_options(commands.add_parser(
        "plan", help="memory of fine-tuning and generation, before anything is loaded",
        description="Predict bytes by part from a configuration alone; nothing is loaded, no GPU is needed.",
        epilog=PLAN_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter))
    _bench_options(commands.add_parser(
        "bench", help="what a training step costs by method, measured side by side",
        description="Memory of training steps, each in a process of its own, and their time, a step of "
        "every arm in turn; ratios are taken within a round.", epilog=BENCH_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    part = commands.add_parser("select", help="choose frames of a video",
                               description="Print the chosen frames of a video: number, seconds.")
    part.set_defaults(command=_select)
    part.add_argument("video", metavar="VIDEO")
    wanted = part.add_mutually_exclusive_group()
    wanted.add_argument("-k", type=int, metavar="N", help="how many frames (default: 8)")
    wanted.add_argument("--coverage", type=float, metavar="C", help="as few as stand for this share, 0 to 1")
    part.add_argument("--policy", metavar="NAME", help="segments (default), own-segments, uniform, packets, "
                      "lowbit-change, diverse ...; a wrong name lists all")
    part.add_argument("--seed", type=int, default=0, help="of the policy `random`")
    part.add_argument("--sheet", metavar="FILE", help="draw the score and the frames there (.png or .pdf)")
    return parser


def _plan_options(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add("model", metavar="MODEL", help="folder, config.json, `released`, or a hub id used here before")
    add("--bits", default="nf4", metavar="BITS", help="nf4 (default), fp4, int8 or bf16")
    add("--rank", type=int, default=8, metavar="R", help="of every adapted layer (default: 8)")
    add("--gate", default="rank", metavar="KIND", help="of the adapters (default: rank)")
    add("--modalities", nargs="+", metavar="PART", help="parts that get adapters (default: all)")
    add("--full", action="store_true", help="train every parameter instead, in float32")
    add("--frames", type=int, default=8, metavar="T", help="of a clip (default: 8)")
    add("--tokens-per-frame", type=int, metavar="M", help="for decoders without a vision tower")
    add("--prompt", type=int, default=32, metavar="N", help="words before the answer (default: 32)")
    add("--answer", type=int, default=32, metavar="N", help="learned or generated words (default: 32)")
    add("--batch", type=int, default=1, metavar="B", help="clips (default: 1)")
    add("--checkpointing", action="store_true", help="blocks are computed again in the backward")
    add("--optimizer", default="adamw_torch", metavar="NAME", help="the Trainer's name of it (adamw_torch)")
    add("--dtype", default="bf16", metavar="D", help="bf16 (default) or fp32")
    add("--device", default="cuda", metavar="D", help="cuda (default) or cpu")
    add("--card", metavar="SIZE", help="memory of the GPU, e.g. 24GB: also say what fits, or what to change")
    add("--reserve", default="0", metavar="SIZE", help="of the GPU's memory, for the driver (default: 0)")
    add("--json", action="store_true", help="print JSON")
    part.set_defaults(command=_plan)


def _bench_options(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add("--model", default="KineVLM", metavar="NAME", help="KineVLM (default) or SmolVLM-135M")
    add("--arms", nargs="+", default=["qlora", "vqlora+lean"], metavar="ARM",
        help="qlora, lora, full, vqlora, lean, and so on; a wrong one lists all (default: qlora vqlora+lean)")
    add("--frames", nargs="+", type=int, default=[8], metavar="T", help="of a clip (default: 8)")
    add("--ranks", nargs="+", type=int, default=[8], metavar="R",
        help="of every adapted layer (default: 8); further ones at the last number of frames")
    add("--rounds", type=int, default=5, metavar="N", help="steps of every arm, in turn (default: 5)")
    add("--batch", type=int, default=1, metavar="B", help="clips (default: 1)")
    add("--work", type=Path, default=Path("build/bench"), metavar="DIR",
        help="checkpoints and what was measured; only what is new is measured")
    add("--csv", type=Path, metavar="DIR", help="write each table there")
    part.set_defaults(command=_bench)


def _notebook(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.steps import make, planned, steps
    root = repository()
    wanted = chosen.notebooks or planned(chosen.profile, root)
    todo = steps(wanted, chosen.profile, root, pretrain=chosen.pretrain or None)
    with lock(root / "build" / chosen.profile / "lock", "vqlora notebook"):
        make(todo, force=chosen.force, at_once=todo[0].here.profile.at_once)
    return 0


def _list(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository
    from vqlora.steps import about, planned, steps
    root = repository()
    for name in planned(chosen.profile, root):
        step = steps([name], chosen.profile, root)[-1]
        title, claim = about(step.path)
        measured, cost = step.stamp.is_file(), step.expected_s()
        words = "not known" if cost is None else f"{'took' if measured else 'about'} {duration(cost)}"
        print(f"{name[:2]}  {title}", claim or "no claim of its own", f"cost ({chosen.profile}): {words}",
              sep="\n    ")
    return 0


def _run(chosen: argparse.Namespace) -> int:
    from vqlora.notebooks import repository, start
    settings = load_run(chosen.settings)
    here = start(chosen.profile, "run", repository())
    if settings.data is None and not (here.data / settings.domain).is_dir():
        have = sorted(path.name for path in here.data.glob("*") if path.is_dir())
        raise ConfigError(f"{chosen.settings}: domain: {settings.domain!r} is not in {here.data}; allowed: "
                          + (", ".join(have) or f"none yet, `make 01 PROFILE={chosen.profile}` renders them"))
    if settings.data is not None:
        from vqlora.data.sources import check_run
        check_run(settings)
    from vqlora import processes
    from vqlora.runs import run_grid
    alone = lock(here.build / "lock", f"vqlora run {chosen.settings}") if processes.first() else nullcontext()
    with alone:
        result = run_grid([settings], here.store, 1, data_root=here.data)[0]
    if not processes.first():
        return 0
    shown = {"stored": str(here.store.path(result.key)), "metrics": result.metrics, "cost": result.cost}
    if result.examples_path.is_file():
        said = result.examples().query("task == 'caption'")[["clip", "reference", "prediction"]]
        shown |= {"examples": str(result.examples_path), "captions": said.head(5).to_dict("records")}
    print(json.dumps(shown, indent=1, ensure_ascii=False))
    return 0


def _audit(chosen: argparse.Namespace) -> int:
    import torch

    from vqlora.auditing import audit, by_modality
    from vqlora.naming import load_any
    try:
        model = load_any(chosen.folder, chosen.base, chosen.bits)
        batch = torch.load(chosen.batch, weights_only=True) if chosen.batch else None
    except (ValueError, FileNotFoundError) as fault:
        raise ConfigError(str(fault)) from fault
    table = audit(model, batch, modalities=chosen.modalities, allow=chosen.allow)
    print(table.reset_index().to_string(index=False), by_modality(table).to_string(), sep="\n\n")
    return 0


def _card(chosen: argparse.Namespace) -> int:
    from vqlora.card import write_card
    try:
        print(os.path.relpath(write_card(chosen.folder, chosen.licence)))
    except ValueError as fault:
        raise ConfigError(str(fault)) from fault
    return 0


def _gpu_check(chosen: argparse.Namespace) -> int:
    from vqlora.gpu_check import check_gpu
    from vqlora.notebooks import repository
    from vqlora.store import write_csv
    try:
        table = check_gpu(say=say)
    except RuntimeError as fault:
        raise ConfigError(str(fault)) from fault
    path = chosen.csv or repository() / "results" / "gpu_check.csv"
    write_csv(path, table)
    print(table.to_string(index=False), os.path.relpath(path), sep="\n")
    return 0 if (table.status == "ok").all() else 1


def _select(chosen: argparse.Namespace) -> int:
    import warnings

    from vqlora.frames.api import DEFAULT, selection
    k = 8 if chosen.k is None and chosen.coverage is None else chosen.k
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = selection(chosen.video, k, chosen.policy or DEFAULT, coverage=chosen.coverage,
                              seed=chosen.seed)
        except ValueError as error:
            raise SelectError(str(error)) from None
    for warning in said:
        say(f"vqlora: {warning.message}")
    for frame in found.frames:
        print(f"{frame}\t{found.times_s[frame]:.3f}")
    if chosen.sheet:
        from vqlora.frames.sheet import draw_sheet
        try:
            draw_sheet(chosen.video, found, chosen.sheet)
        except (ImportError, OSError, ValueError) as error:
            raise SelectError(f"{chosen.sheet}: {error}") from None
    return 0


def _plan(chosen: argparse.Namespace) -> int:
    import warnings

    from vqlora.cost.command import describe_plan
    warnings.simplefilter("ignore")
    try:
        found = describe_plan(chosen)
    except (ValueError, KeyError) as fault:
        raise ConfigError(str(fault.args[0])) from fault
    print(json.dumps(found.to_dict(), indent=1) if chosen.json else found)
    return 0


def _bench(chosen: argparse.Namespace) -> int:
    import pandas as pd

    from vqlora.cost.bench_study import measure_steps, measure_times
    from vqlora.cost.bench_tables import costs, growth, ratios, show
    from vqlora.experiments import CostModel
    model = CostModel(model=chosen.model, batch=chosen.batch, frames=chosen.frames, at=chosen.frames[-1],
                      rank=chosen.ranks[0], ranks=chosen.ranks[1:], rounds=chosen.rounds)
    try:
        steps = measure_steps([model], chosen.arms, kept=chosen.work, say=say)
        times = measure_times([model], chosen.arms, kept=chosen.work, say=say)
    except KeyError as fault:
        raise ConfigError(str(fault.args[0])) from fault
    table = costs(steps, times)
    grown = [growth(table, along).assign(along=along) for along in ("frames", "rank")]
    found = {"costs": table, "ratios": ratios(steps, times), "growth": pd.concat(grown, ignore_index=True)}
    for name, table in found.items() if chosen.csv else ():
        from vqlora.runs import write_csv
        write_csv(chosen.csv / f"{name}.csv", table)
    print(show(found))
    return 0


class SelectError(Exception):
    """A request to `vqlora select` that cannot be met; the message is for the user."""


if __name__ == "__main__":
    sys.exit(main())
