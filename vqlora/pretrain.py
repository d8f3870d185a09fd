"""Train the embedded base from scratch: clips drawn in memory by the benchmark's own renderer, none seen
twice.

Two stages in one Trainer run. First vision tower and projector, on labels from the renderer: which sprite
covers a patch and how it is posed; and each visual token must read as the name of what it shows, through the
shared output head, and tell what moved since the frame before. Then everything: captions, questions,
retrieval and text-only sentences, the labels kept on; and half-way up the decoder a visual token must know
which event it shows, counted from the first: the words of a caption ask for just that. Text rows of one clip
are packed behind its visual tokens: the attention mask keeps them apart, so the frames are read once for all.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import torch

from .base import build_tokenizer, small_config
from .config import PretrainSettings
from .pretrain_data import Pack, SourceClips
from .pretrain_model import KineVLMForPretraining


def new_model(recipe: PretrainSettings):
    """A fresh ``(model, tokenizer)``, weights fixed by ``recipe.seed``."""
    from .data.kinemoji.language import vocabulary

    tokenizer = build_tokenizer(vocabulary())
    config = small_config(
        len(tokenizer),
        width=recipe.width,
        layers=recipe.layers,
        vision_width=recipe.vision_width,
        vision_layers=recipe.vision_layers,
        vision_heads=recipe.vision_width // 32,
    )
    kind = KineVLMForPretraining
    if recipe.architecture == "smolvlm":  # by name: the base's own training does not depend on its rival
        rival = importlib.import_module("vqlora.stock_base")
        kind, config = rival.StockForPretraining, rival.StockConfig.like(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return kind(config, recipe), tokenizer


def pretrain(recipe: PretrainSettings, out: Path) -> Path:
    """Train in ``recipe.processes`` one-thread processes; the model lands in ``out/model``, whose path is
    returned.

    A killed training goes on from its last checkpoint, and a finished one is not repeated, as long as
    recipe and code are the same; otherwise it starts anew. Raises RuntimeError when training fails (its
    messages are on the terminal).
    """
    out, done = Path(out), Path(out, "model", "done")
    begin(recipe, out)
    if not done.is_file():
        _launch(recipe, out)
        done.touch()
    return done.parent


def begin(recipe: PretrainSettings, out: Path) -> None:
    """Lay out the folder for a training; what another recipe or other code left there is removed."""
    from .identity import code_hash

    out.mkdir(parents=True, exist_ok=True)
    stamp = f"{recipe.model_dump_json(exclude={'pretrain', 'val_clips'})}\n{code_hash(['vqlora.pretrain'])}\n"
    if not (out / "recipe.json").is_file() or (out / "recipe.json").read_text() != stamp:
        for old in ("checkpoints", "model"):
            shutil.rmtree(out / old, ignore_errors=True)
        (out / "recipe.json").write_text(stamp)


def _launch(recipe: PretrainSettings, out: Path) -> None:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable]
    if recipe.processes > 1:
        # By address, not by name, so that it works where "localhost" or the host's own name does not resolve.
        threads |= {"GLOO_SOCKET_IFNAME": "lo"}
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(recipe.processes)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    command += ["-m", "vqlora.pretrain", str(out)]
    read, write = os.pipe()  # nothing is ever written: it closes when this process ends, however it ends
    try:
        done = subprocess.run(command, stdin=read, env={**os.environ, **threads})
    finally:
        os.close(read)
        os.close(write)
    if done.returncode:
        raise RuntimeError(
            f"pretraining in {out} ended with exit code {done.returncode}; its messages are above"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(out: Path) -> None:
    """Train what `begin` laid out, in this process or together with those that a launcher started."""
    from transformers import Trainer, TrainingArguments

    from . import processes
    from .checkpoints import MarkWhole, last_whole_checkpoint

    recipe = PretrainSettings.model_validate_json((out / "recipe.json").read_text().splitlines()[0])
    model, tokenizer = new_model(recipe)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // recipe.processes,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=["tensorboard"],
        use_cpu=True,
        seed=recipe.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        dataloader_num_workers=0,
        disable_tqdm=os.environ.get("RANK", "0") != "0",
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(
                self.train_dataset
            )  # clips are random already; stages are not

        def log(self, logs, *args, **kwargs):
            super().log(logs | {name: round(part, 4) for name, part in model.parts.items()}, *args, **kwargs)

    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=SourceClips(recipe),
        data_collator=Pack(tokenizer, model.config.tokens_per_frame),
        callbacks=[MarkWhole()],
    )
    last = processes.told(lambda: last_whole_checkpoint(out / "checkpoints"))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        base = model.bare()
        base.load_state_dict(model.state_dict(), strict=False)  # less the dense head and the temperature
        base.to(torch.bfloat16).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")


def _end_with_parent() -> None:
    """Wait for the end of standard input, that of `pretrain`: two trainings would spoil one folder."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(Path(sys.argv[1]))
