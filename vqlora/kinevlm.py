"""KineVLM: a LLaVA-shaped video-language model small enough to train from scratch on two cores.

Glossary: B clips (rows), T frames, N = grid^2 patches a frame, M = 4 visual tokens a frame, D text width,
L tokens, S windows of sound. Frames never mix inside the vision tower. The projector sees each frame and its
difference to the previous one; the decoder is the first place where all frames meet. A model that listens has
an audio tower beside the vision tower (`vqlora.kinesound`), whose tokens follow those of the frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from vqlora.kinesound import KineAudioTower, clock

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<emb>", "<cap>", "<qst>", "<ans>")


class KineVLMConfig(PreTrainedConfig):
    """Sizes of a KineVLM: ``text_config`` is a stock ``LlamaConfig`` (or its dict), the rest its towers'.

    ``audio_bands``: 0 for a model without an audio tower, as the released base is.
    """

    model_type = "kinevlm"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        image_size: int = 64,
        vision_width: int = 128,
        vision_layers: int = 4,
        vision_heads: int = 4,
        projector_width: int = 256,
        embed_width: int = 128,
        text_config: dict | LlamaConfig | None = None,
        image_token_id: int = SPECIAL_TOKENS.index("<image>"),
        embed_token_id: int = SPECIAL_TOKENS.index("<emb>"),
        audio_bands: int = 0,
        audio_width: int = 128,
        initializer_range: float = 0.06,  # about 1 / sqrt(width): at these widths 0.02 starts too quiet
        **kwargs,
    ):
        if image_size % 32:
            raise ValueError(
                f"image_size {image_size} is not a multiple of 32 (patches of 16 pixels, merged 2 x 2)"
            )
        if audio_bands < 0:
            raise ValueError(f"audio_bands: {audio_bands}; allowed: 0 (no sound) or more")
        self.image_size = image_size
        self.vision_width = vision_width
        self.vision_layers = vision_layers
        self.vision_heads = vision_heads
        self.projector_width = projector_width
        self.embed_width = embed_width
        self.audio_bands, self.audio_width = audio_bands, audio_width
        if not isinstance(text_config, LlamaConfig):
            text_config = LlamaConfig(**(text_config or {}))
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.embed_token_id = embed_token_id
        self.initializer_range = initializer_range
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // 16

    @property
    def tokens_per_frame(self) -> int:
        return (self.grid // 2) ** 2


class _Stem(nn.Module):
    """Three strided convolutions, pixels to grid x grid x width: a linear patch embedding learned worse."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3 * width // 8, kernel_size=4, stride=4)
        self.conv2 = nn.Conv2d(3 * width // 8, 3 * width // 4, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(3 * width // 4, width, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on CPU
        for conv in (self.conv1, self.conv2):
            x = F.gelu(conv(x), approximate="tanh")
        return self.conv3(x).flatten(2).transpose(1, 2)  # [B*T, N, width]


class _Attention(nn.Module):
    """Bidirectional self-attention over the patches of one frame."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, n, width = x.shape
        q, k, v = (
            p(x).view(rows, n, self.heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Written out: at 16 patches the fused kernel is no faster, and its bf16 backward on CPU far slower.
        weights = torch.softmax(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5), dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(rows, n, width))


class _MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = _Attention(width, heads), _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class KineVisionTower(nn.Module):
    """Frames ``[B*T, 3, H, W]`` in [-1, 1] to features ``[B*T, N, width]``; rows by sample, then frame."""

    def __init__(self, config: KineVLMConfig):
        super().__init__()
        width = config.vision_width
        self.stem = _Stem(width)
        self.position = nn.Embedding(config.grid**2, width)
        self.layers = nn.ModuleList(_Block(width, config.vision_heads) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.stem(frames) + self.position.weight
        for block in self.layers:
            x = block(x)
        return self.norm(x)


class KineProjector(nn.Module):
    """Fusion: 2 x 2 patches become one token, which carries its frame, its change since the last, and its
    time."""

    def __init__(self, config: KineVLMConfig):
        super().__init__()
        self.grid = config.grid
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(8 * config.vision_width, config.projector_width)
        self.linear_2 = nn.Linear(config.projector_width, width)
        self.place = nn.Embedding(config.tokens_per_frame, width)
        self.time = nn.Linear(32, width)

    def forward(self, features: Tensor, times: Tensor) -> Tensor:
        """``features [B*T, N, W]``, ``times [B, T]`` -> ``[B, T*M, D]``."""
        clips, frames = times.shape
        g = self.grid // 2
        x = (
            features.view(clips, frames, g, 2, g, 2, -1)
            .permute(0, 1, 2, 4, 3, 5, 6)
            .reshape(clips, frames, g * g, -1)
        )
        change = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], dim=1)
        x = self.linear_2(F.gelu(self.linear_1(torch.cat([x, change], dim=-1)), approximate="tanh"))
        # Of unit size: features that may grow drown place and time, and with them the order of events.
        x = F.layer_norm(x, x.shape[-1:])
        when = self.time(clock(times).to(x.dtype))
        return (x + self.place.weight + when[:, :, None]).flatten(1, 2)


class KineModel(nn.Module):
    """Vision tower, projector and a stock Llama decoder, under the names that LLaVA-like models use.

    With ``audio_bands`` also an audio tower, the last of the parts: what is drawn for the others (weights,
    adapters) does not depend on it.
    """

    def __init__(self, config: KineVLMConfig):
        super().__init__()
        self.vision_tower = KineVisionTower(config)
        self.multi_modal_projector = KineProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.audio_bands:
            self.audio_tower = KineAudioTower(config)


@dataclass
class KineOutput(ModelOutput):
    """``loss`` scalar, ``logits [B, L, V]``, ``past_key_values``, ``last_hidden_state [B, L, D]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class KineVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Captions, answers and retrieval vectors from one decoder over visual placeholder tokens.

    >>> from vqlora.base import tiny
    >>> model, tokenizer = tiny(seed=0)
    >>> ids = torch.tensor([[1] + [4] * 4 * 2 + [5, 6]])  # <bos> two frames of four <image> <emb> <cap>
    >>> out = model(ids, pixel_values=torch.zeros(1, 2, 3, 64, 64), frame_times=torch.tensor([[0.0, 1.0]]))
    >>> tuple(out.logits.shape) == (1, 11, model.config.text_config.vocab_size)
    True
    """

    config_class = KineVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["_Block", "LlamaDecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: KineVLMConfig):
        super().__init__(config)
        self.model = KineModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.embed_head = nn.Linear(config.text_config.hidden_size, config.embed_width, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, KineProjector):
            init.normal_(module.place.weight, std=0.5)
        if isinstance(module, KineProjector | KineAudioTower):
            init.normal_(module.time.weight, std=0.5 / 4)  # its input has norm 4

    def get_input_embeddings(self):
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.language_model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def video_tokens(self, pixel_values: Tensor, frame_times: Tensor | None = None) -> Tensor:
        """``pixel_values [B, T, 3, H, W]`` in [-1, 1], ``frame_times [B, T]`` -> ``[B, T*M, D]``."""
        clips, frames = pixel_values.shape[:2]
        if frame_times is None:
            frame_times = torch.linspace(0, 1, frames, device=pixel_values.device).expand(clips, frames)
        dtype = self.model.vision_tower.stem.conv3.weight.dtype
        features = self.model.vision_tower(pixel_values.flatten(0, 1).to(dtype))
        return self.model.multi_modal_projector(features, frame_times)

    def sound_tokens(self, sound: Tensor) -> Tensor:
        """``sound [B, S, bands]`` -> ``[B, S, D]``. Raises ValueError for a model without an audio tower."""
        if not self.config.audio_bands:
            raise ValueError("sound: this model has no audio tower (audio_bands: 0); see vqlora.sound.align")
        return self.model.audio_tower(sound.to(self.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_times: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        sound: Tensor | None = None,
        **kwargs,
    ) -> KineOutput:
        """Shapes: ``input_ids``, ``attention_mask``, ``labels [R, L]`` (-100 where nothing is learned).

        R is a multiple of the B clips in ``pixel_values``: several rows of text may share one clip, whose
        frames are then encoded once. ``sound [B, S, bands]`` goes with ``pixel_values``: a clip's last S
        ``<image>`` tokens stand for its windows.

        Raises ValueError if the number of ``<image>`` tokens and visual tokens differ.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            shown = self.video_tokens(pixel_values, frame_times)
            if sound is not None:
                shown = torch.cat([shown, self.sound_tokens(sound)], dim=1)
            inputs_embeds = self._fill(input_ids, inputs_embeds, shown)
        out = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size
            )
        return KineOutput(loss, logits, out.past_key_values, hidden, out.hidden_states, out.attentions)

    def _fill(self, input_ids: Tensor, inputs_embeds: Tensor, visual: Tensor) -> Tensor:
        rows, clips = input_ids.shape[0], visual.shape[0]
        if rows != clips and rows % clips == 0:
            visual = visual.repeat_interleave(rows // clips, dim=0)
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != visual.shape[0] * visual.shape[1]:
            raise ValueError(
                f"input_ids hold {int(places.sum())} <image> tokens in {rows} rows, but {clips} clips gave "
                f"{visual.shape[1]} visual tokens each ({self.config.tokens_per_frame} a frame)"
            )
        return inputs_embeds.masked_scatter(places[..., None], visual.to(inputs_embeds.dtype))

    def embed(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Retrieval vectors ``[B, E]``, L2-normalised: ``hidden [B, L, D]`` read at each row's last
        ``<emb>``."""
        found = input_ids == self.config.embed_token_id
        if not bool(found.any(dim=1).all()):
            raise ValueError("every row needs an <emb> token to give a retrieval vector")
        last = input_ids.shape[1] - 1 - found.int().flip(1).argmax(dim=1)
        rows = torch.arange(len(last), device=hidden.device)
        return F.normalize(self.embed_head(hidden[rows, last]).float(), dim=-1)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        pixel_values=None,
        frame_times=None,
        sound=None,
        is_first_iteration=False,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs.update(pixel_values=pixel_values, frame_times=frame_times)
            inputs |= {} if sound is None else {"sound": sound}
        return inputs


AutoConfig.register("kinevlm", KineVLMConfig, exist_ok=True)
AutoModel.register(KineVLMConfig, KineVLMForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(KineVLMConfig, KineVLMForConditionalGeneration, exist_ok=True)
