"""QLoRA fine-tuning for video-language models."""
