"""The rival of the embedded base: the stock SmolVLM class, in the same sizes and by the same recipe.

    table = train_and_score(profile.stock, profile.base, out, clips, store)   # `results/02_base/stock.csv`

Vision tower, connector and decoder are those of transformers, put where KineVLM has its own, so that losses,
data and evaluation are the same. What SmolVLM lacks is what KineVLM adds: a stem of three convolutions, a
projector that sees the change since the frame before, and each token's place and time beside its content.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, SmolVLMConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

from vqlora.base_check import score_base
from vqlora.config import PretrainSettings
from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip
from vqlora.kinevlm import KineVLMConfig, KineVLMForConditionalGeneration
from vqlora.pretrain import KineVLMForPretraining, new_model, pretrain
from vqlora.pretrain_data import Pack, SourceClips


class StockConfig(KineVLMConfig):
    """Sizes of KineVLM, for SmolVLM's parts."""

    model_type = "kinevlm_stock"

    def __init__(self, **kwargs):  # without one of its own, transformers makes one that skips KineVLM's
        super().__init__(**kwargs)

    @classmethod
    def like(cls, config: KineVLMConfig) -> StockConfig:
        """The same sizes."""
        return cls(**{key: value for key, value in config.to_dict().items() if key != "model_type"})

    def smolvlm(self) -> SmolVLMConfig:
        """The configuration of the stock model that has these sizes."""
        vision = SmolVLMVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=16,
            initializer_range=self.initializer_range,
        )
        return SmolVLMConfig(
            vision_config=vision,
            text_config=self.text_config,
            scale_factor=2,
            image_token_id=self.image_token_id,
            pad_token_id=self.text_config.pad_token_id,
            tie_word_embeddings=True,
        )


class _Tower(nn.Module):
    """``[B*T, 3, H, W]`` to ``[B*T, N, width]``."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.vision_model = SmolVLMVisionTransformer._from_config(
            config.vision_config, attn_implementation="sdpa"
        )

    def forward(self, frames: Tensor) -> Tensor:
        return self.vision_model(frames).last_hidden_state


class _Connector(nn.Module):
    """``[B*T, N, width]`` to ``[B, T*M, D]``; SmolVLM gives its tokens no time: the decoder counts them."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.connector = SmolVLMConnector(config)

    def forward(self, features: Tensor, times: Tensor) -> Tensor:
        clips, frames = times.shape
        return self.connector(features).view(clips, frames * 4, -1)


class _Stock:
    """Puts SmolVLM's parts where KineVLM has its own."""

    config_class = StockConfig

    def put_stock_parts(self) -> None:
        config = self.config.smolvlm()
        self.model.vision_tower, self.model.multi_modal_projector = _Tower(config), _Connector(config)
        self.post_init()

    def video_tokens(self, pixel_values: Tensor, frame_times: Tensor | None = None) -> Tensor:
        clips, frames = pixel_values.shape[:2]
        times = pixel_values.new_zeros(clips, frames) if frame_times is None else frame_times
        return self.model.multi_modal_projector(self.model.vision_tower(pixel_values.flatten(0, 1)), times)


class StockModel(_Stock, KineVLMForConditionalGeneration):
    """SmolVLM under KineVLM's interface, for evaluation."""

    def __init__(self, config: StockConfig):
        super().__init__(config)
        self.put_stock_parts()


class StockForPretraining(_Stock, KineVLMForPretraining):
    """SmolVLM with the heads and losses of the base's pretraining."""

    def __init__(self, config: StockConfig, recipe: PretrainSettings | None = None):
        super().__init__(config, recipe)
        self.put_stock_parts()

    def bare(self) -> StockModel:
        return StockModel(self.config)


def step_seconds(recipe: PretrainSettings, steps: Sequence[int]) -> float:
    """CPU seconds of this process that forward and backward of the given steps' batches take, their mean."""
    model, tokenizer = new_model(recipe)
    clips, pack = SourceClips(recipe), Pack(tokenizer, model.config.tokens_per_frame)
    spent = []
    for step in (steps[0], *steps):  # the first one twice: it warms up
        batch = pack([clips[step * recipe.batch_size + i] for i in range(recipe.batch_size)])
        began = time.process_time()
        model(**batch)["loss"].backward()
        spent.append(time.process_time() - began)
        model.zero_grad(set_to_none=True)
    return sum(spent[1:]) / len(steps)


def costs(recipe: PretrainSettings) -> dict[str, float]:
    """What a training costs by its steps: step_s of either stage, and both together in CPU seconds, drawing
    of the clips left out (it is the same for all)."""
    first, second = [0, 1, 2], [recipe.vision_steps + i for i in range(len(recipe.frames))]
    seeing, joint = step_seconds(recipe, first), step_seconds(recipe, second)
    whole = recipe.vision_steps * seeing + (recipe.steps - recipe.vision_steps) * joint
    return {"vision_step_s": seeing, "joint_step_s": joint, "train_cpu_s": whole}


def train_and_score(
    stock: PretrainSettings, own: PretrainSettings, out: str | Path, clips: tuple[Clip, ...],
    store: FrameStore
) -> pd.DataFrame:
    """Train the stock class by `stock`: base, frames, metric, value are its scores, then what either recipe
    costs, measured one after the other in this process. `out` keeps the training, which can be resumed.
    """
    folder = pretrain(stock, Path(out))
    model = StockModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = score_base(model, AutoTokenizer.from_pretrained(folder), clips, store)
    rows = scores.melt(id_vars="frames", var_name="metric", value_name="value").assign(base="stock")
    spent = []
    for name, recipe in (("stock", stock), ("own", own)):
        counted = sum(p.numel() for p in new_model(recipe)[0].bare().parameters())
        found = {**costs(recipe), "steps": recipe.steps, "parameters": counted}
        spent += [{"base": name, "frames": "training", "metric": key, "value": value}
                  for key, value in found.items()]  # fmt: skip
    return pd.concat([rows, pd.DataFrame(spent)])[["base", "frames", "metric", "value"]]
