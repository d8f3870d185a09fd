"""The rival of the embedded base: the stock SmolVLM class, in the same sizes and by the same recipe.

Vision tower, connector and decoder are those of transformers, put where KineVLM has its own, so that losses,
data and evaluation are the same. What SmolVLM lacks is what KineVLM adds: a stem of three convolutions, a
projector that sees the change since the frame before, and each token's place and time beside its content.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SmolVLMConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

from vqlora.config import PretrainSettings
from vqlora.kinevlm import KineVLMConfig, KineVLMForConditionalGeneration
from vqlora.pretrain_model import KineVLMForPretraining


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
