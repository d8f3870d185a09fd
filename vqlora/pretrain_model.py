"""What the base is while it is pretrained: the model with heads and losses of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqlora.config import PretrainSettings
from vqlora.data.kinemoji.domains import MOTIONS
from vqlora.kinevlm import KineVLMForConditionalGeneration
from vqlora.pretrain_data import IGNORE, NOBODY


class KineVLMForPretraining(KineVLMForConditionalGeneration):
    """The base plus what only pretraining needs: the dense head, the temperature and the sum of losses."""

    def __init__(self, config, recipe: PretrainSettings | None = None):
        super().__init__(config)
        self.recipe = recipe or PretrainSettings()
        self.dense_head = nn.Linear(config.vision_width, NOBODY + 1 + 6)
        self.motion_head = nn.Linear(config.text_config.hidden_size, len(MOTIONS) + 1)
        self.turn_head = nn.Linear(config.text_config.hidden_size, 4)  # no event, or the first to third
        self.log_temperature = nn.Parameter(torch.tensor(2.5))
        self.post_init()

    def bare(self) -> KineVLMForConditionalGeneration:
        """A model of the same sizes without what only pretraining needs."""
        return KineVLMForConditionalGeneration(self.config)

    def forward(self, pixel_values, frame_times, patches, motions, turns, names, input_ids=None, labels=None,
    position_ids=None,
                attention_mask=None, text_ids=None, text_labels=None, text_mask=None):  # fmt: skip
        recipe, read = self.recipe, super().forward
        features = self.model.vision_tower(pixel_values.flatten(0, 1))
        visual = self.model.multi_modal_projector(features, frame_times)
        called = self.lm_head(
            self.model.language_model.norm(visual)
        )  # a visual token should read as its name
        parts = {
            "dense": recipe.dense_weight * dense_loss(self.dense_head(features), patches.flatten(0, 1)),
            "name": recipe.name_weight
            * F.cross_entropy(called.flatten(0, 1), names.flatten(), ignore_index=IGNORE),
        }
        seen = F.cross_entropy(self.motion_head(visual).flatten(0, 1), motions.flatten())
        parts["motion"] = recipe.motion_weight * seen
        if input_ids is not None:
            embeds = self._fill(input_ids, self.get_input_embeddings()(input_ids), visual)
            told = read(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
            labels=labels,
                        output_hidden_states=True, use_cache=False)  # fmt: skip
            text = read(text_ids, attention_mask=text_mask, labels=text_labels, use_cache=False)
            clips = len(pixel_values)
            # Half-way up, a visual token should know how many events came before: the words look them up.
            halfway = told.hidden_states[self.config.text_config.num_hidden_layers // 2]
            counted = self.turn_head(halfway[input_ids == self.config.image_token_id])
            parts["turn"] = recipe.turn_weight * F.cross_entropy(counted, turns.flatten())
            match = contrastive_loss(
                self.embed(told.last_hidden_state, input_ids),
                self.embed(text.last_hidden_state[:clips], text_ids[:clips]),
                self.log_temperature.exp(),
            )
            parts |= {"told": told.loss, "match": recipe.contrastive_weight * match,
                      "text": recipe.text_weight * text.loss}  # fmt: skip
        self.parts = {name: part.item() for name, part in parts.items()}
        return {"loss": sum(parts.values())}


def dense_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the covering sprite plus smooth L1 of its pose where there is one."""
    sprite, pose = wanted[..., 0].long(), wanted[..., 1:]
    loss = F.cross_entropy(predicted[..., : NOBODY + 1].flatten(0, 1), sprite.flatten())
    there = sprite < NOBODY
    if there.any():
        loss = loss + 2 * F.smooth_l1_loss(predicted[..., NOBODY + 1 :][there], pose[there], beta=0.1)
    return loss


def contrastive_loss(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over this process's clips and those of its peers (``[B, E]`` each, L2-normalised)."""
    rank = 0
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather

        rank = torch.distributed.get_rank()
        all_text, all_video = torch.cat(all_gather(text)), torch.cat(all_gather(video))
    else:
        all_text, all_video = text, video
    target = torch.arange(len(video)) + rank * len(video)
    return (
        F.cross_entropy(scale * video @ all_text.T, target)
        + F.cross_entropy(scale * text @ all_video.T, target)
    ) / 2
