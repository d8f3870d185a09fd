"""A small run's settings and a stock model, shared by tests."""

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

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


def tiny_smolvlm():
    """A random SmolVLM of 0.2M parameters, one vision and two text layers."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=5)
    )
