"""What works on which class, tried here and now on tiny random models: the table of the README and the paper.

table = compatibility()                 # a row per class of vqlora.zoo; each cell "yes" or a short reason
python -m vqlora.zoo.compat > table.md      # the same, as Markdown
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vqlora.adapter import VQLoraConfig, gates
from vqlora.adapter.merge import merge
from vqlora.auditing import audit
from vqlora.modalities import MODALITIES, describe, target_modules
from vqlora.modalities.rows import frame_rows
from vqlora.probe import probe
from vqlora.quantize import close_packing_trap, load_quantized
from vqlora.zoo import ZOO, tiny_batch, tiny_model

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("forward", "backward", "NF4", "reload", "merge", "gates", "audit")
_FEATURES = ("first", "second")
_OUTPUTS = ("logits", "logits_per_video", "last_hidden_state")


def compatibility(
    names: Iterable[str] | None = None, threads: int = 1, workers: int = 1
) -> pd.DataFrame:
    """Table over the classes of `vqlora.zoo` (all, or the named ones): "yes" where all of this holds.

    forward: on a float32 base, gated adapters on every part equal the base at the start, and
        those of gate "none" equal stock peft LoRA, gradients too, all but for the last bits.
    backward: every adapter and gate parameter gets a gradient.
    NF4: both again on a 4-bit base.
    reload: saved adapters on a fresh 4-bit base in a fresh process give the same outputs, again so.
    merge: exact with a constant gate; with the mean gate closer than the base; saved and loaded again by the
        class's own `from_pretrained`, the merged model gives the same outputs but for the last bits.
    gates: other features of one frame change that frame's gates alone; frames permuted, gates permuted.
    audit: no fault.

    About 5 CPU-seconds a class and 10 for the fresh process. workers: processes that share the classes.
    Raises KeyError for an unknown name.
    """
    import pandas as pd

    names = tuple(ZOO if names is None else names)
    for name in names:
        if name not in ZOO:
            raise KeyError(f"no class {name!r}; known: {', '.join(ZOO)}")
    index = pd.Index([type(tiny_model(name)).__name__ for name in names], name="class")
    if workers > 1:
        shares = [names[i::workers] for i in range(workers)]
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            return pd.concat(pool.map(partial(compatibility, threads=threads), shares)).loc[index]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = {name: _row(name, Path(folder, name)) for name in names}
            again = _reload_elsewhere(names, folder, threads)
    finally:
        torch.set_num_threads(before)
    for name, cell in again.items():
        rows[name]["reload"] = cell if rows[name]["reload"] == "yes" else rows[name]["reload"]
    return pd.DataFrame([rows[name] for name in names], index=index, columns=list(COLUMNS))


def to_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, without a library for it."""
    lines = [["class", *table.columns], ["---"] * (len(table.columns) + 1)]
    lines += [[f"`{name}`", *row] for name, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(name: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {
        "forward": _cell(_forward, name, None),
        "backward": _cell(_backward, name, None),
        "NF4": _cell(lambda: (_forward(name, "nf4"), _backward(name, "nf4"))),
        "reload": _cell(_save, name, folder),
        "merge": _cell(_merge, name, folder),
        "gates": _cell(_gates, name),
        "audit": _cell(lambda: audit(_adapted(name, "nf4"), tiny_batch(name, tiny_model(name)))),
    }


def _cell(attempt: Callable, *args) -> str:
    try:
        attempt(*args)
    except Exception as fault:  # whatever goes wrong is what the table is for
        words = " ".join(f"{fault}".split()) or type(fault).__name__
        return words if len(words) <= 80 else words[:77] + "..."
    return "yes"


def _base(name: str, bits: str | None) -> nn.Module:
    model = tiny_model(name)
    return model if bits is None else load_quantized(model, bits, compute_dtype="fp32", device="cpu")


def _adapted(name: str, bits: str | None, shaken: bool = False, **options) -> PeftModel:
    base = _base(name, bits)
    parts = tuple(m for m in MODALITIES if getattr(describe(base), m))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, VQLoraConfig(**{"r": 4, "modalities": parts, **options}))
    if shaken:
        generator = torch.Generator().manual_seed(1)
        for key, param in model.named_parameters():
            if "lora_B" in key or "lora_gate." in key:
                param.data = torch.randn(param.shape, generator=generator) * 0.2
    return model.eval()


def _output(model: nn.Module, batch: dict) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    found = next(output[key] for key in _OUTPUTS if isinstance(output.get(key), Tensor))
    _hold(bool(found.isfinite().all()), "outputs are not finite")
    return found


def _hold(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the last bits: some processors add up in an order that depends on where in memory rows
    lie, so that two models of the same bytes may differ in them."""
    if torch.equal(one, other):
        return True
    bits = 16 if one.dtype == torch.float32 else 4
    return bool((one - other).abs().max() <= 2.0**-bits * other.abs().max())


def _forward(name: str, bits: str | None) -> None:
    model = _adapted(name, bits)
    batch = tiny_batch(name, model.get_base_model())
    start = _output(_base(name, bits), batch)
    _hold(_same(_output(model, batch), start), "differs from the base at the start")
    base = _base(name, bits)
    parts = tuple(m for m in MODALITIES if getattr(describe(base), m))
    plain = get_peft_model(base, LoraConfig(r=4, target_modules=target_modules(base, parts))).eval()
    ours, values = _adapted(name, bits, shaken=True, gate="none"), {}
    for key, param in ours.named_parameters():
        values[key] = param.data
    for key, param in plain.named_parameters():
        if ".lora_" in key:
            param.data.copy_(values[key])
    found = []
    for either in (ours, plain):
        torch.manual_seed(0)
        either(**batch)["loss"].backward()
        found.append({key: p.grad for key, p in either.named_parameters() if p.grad is not None})
    _hold(_same(_output(ours, batch), _output(plain, batch)), "gate none differs from plain LoRA")
    same = found[0].keys() == found[1].keys() and all(_same(found[0][k], found[1][k]) for k in found[0])
    _hold(same, "gate none has other gradients than plain LoRA")


def _backward(name: str, bits: str | None) -> None:
    model = _adapted(name, bits)
    base = model.get_base_model()
    measured = probe(model, tiny_batch(name, base), describe(base))
    missing = [key for key, norm in measured.moved.items() if norm is None]
    _hold(not missing, f"no gradient: {', '.join(missing)}")


def _save(name: str, folder: Path) -> None:
    model = _adapted(name, "nf4", shaken=True)
    model.save_pretrained(folder / "adapter")
    torch.save(_output(model, tiny_batch(name, model.get_base_model())), folder / "output.pt")


def _reload_elsewhere(names: Iterable[str], folder: str, threads: int) -> dict[str, str]:
    """Every saved adapter in one fresh process, which prints a line per class."""
    code = "import sys; from vqlora.zoo.compat import _reload; _reload(sys.argv[1], *sys.argv[2:])"
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, folder, *names],
        env=environment,
        capture_output=True,
        text=True,
    )
    cells = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return {name: cells.get(name, f"the fresh process ended with {done.returncode}") for name in names}


def _reload(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        print(name, _cell(_reload_one, name, Path(folder, name)), sep="\t", flush=True)


def _reload_one(name: str, folder: Path) -> None:
    base = _base(name, "nf4")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    close_packing_trap(model)
    same = _same(_output(model, tiny_batch(name, base)), torch.load(folder / "output.pt"))
    _hold(same, "outputs differ after a reload")


def _merge(name: str, folder: Path) -> None:
    model = _adapted(name, None, shaken=True, control="constant")
    batch = tiny_batch(name, model.get_base_model())
    error = merge(model, batch, dtype=torch.float32)[1].error
    _hold(error.worst < 1e-4, f"constant gate merged with an error of {error.worst:.1e}")
    merged, report = merge(_adapted(name, "nf4", shaken=True), batch)
    _hold(report.error.lost_worst < 1, "the merged model is farther off than the base")
    merged.save_pretrained(folder / "merged")
    again = type(merged).from_pretrained(folder / "merged", dtype=torch.bfloat16).eval()
    same = _same(_output(again, batch), _output(merged, batch))
    _hold(same, "the merged model differs after a reload")


def _gates(name: str) -> None:
    names = {"feature_names": _FEATURES, "features": "scores"}
    model = _adapted(name, None, shaken=True, gate="rank", **names)
    base = model.get_base_model()
    batch = tiny_batch(name, base)
    rows = frame_rows(base, batch)
    counts = torch.bincount(rows.clip, minlength=rows.clips)
    features = torch.zeros(rows.clips, int(counts.max()), len(_FEATURES))
    generator = torch.Generator().manual_seed(2)
    for clip, count in enumerate(counts.tolist()):
        features[clip, :count] = torch.randn(count, len(_FEATURES), generator=generator)
    before = _gates_with(model, batch, features)
    changed = features.clone()
    changed[0, 1] += 1.0
    place = (rows.clip == 0).nonzero()[1, 0]
    order = torch.arange(rows.frames)
    order[: int(counts[0])] = torch.arange(int(counts[0])).flip(0)
    turned = features.clone()
    turned[0, : int(counts[0])] = features[0, : int(counts[0])].flip(0)
    after, permuted = _gates_with(model, batch, changed), _gates_with(model, batch, turned)
    _hold(bool(before), "no layer has a gate")
    for layer, table in before.items():
        moved = (after[layer] != table).any(dim=1).nonzero().flatten().tolist()
        if len(table) > 1:
            _hold(moved == [int(place)], f"{layer}: gates of frames {moved} changed with frame {int(place)}")
            _hold(torch.equal(permuted[layer], table[order]), f"{layer}: gates do not follow their frames")


def _gates_with(model: PeftModel, batch: dict, features: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        model(**batch, frame_features=features)
    return {layer: table.clone() for layer, table in gates(model).items()}


if __name__ == "__main__":
    print(to_markdown(compatibility(sys.argv[1:] or None)))
