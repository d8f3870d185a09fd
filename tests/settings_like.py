"""Settings of a small run with the fields and defaults of vqlora.config.RunSettings."""

from vqlora.config import RunSettings


def settings_like(arm="qlora", bits="nf4", **overrides):
    values = {
        "experiment": "test",
        "arm": arm,
        "bits": bits,
        "domain": "language",
        "seed": 0,
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 1e-2,
        "steps": 6,
        "batch_size": 2,
        "warmup_steps": 2,
        "train_clips": 4,
        "eval_clips": 4,
        "frames": 2,
    }
    return RunSettings(**{**values, **overrides})
