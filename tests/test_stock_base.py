"""The stock rival of the base: it is SmolVLM indeed, and is trained, saved and scored like the base."""

import torch
from test_pretrain import SMALL
from transformers import SmolVLMForConditionalGeneration

from vqlora.pretrain import new_model, pretrain
from vqlora.stock_base import StockForPretraining, StockModel
from vqlora.studies.base_study import costs

STOCK = SMALL.model_copy(update={"architecture": "smolvlm"})


def test_it_computes_what_transformers_own_class_computes():
    ours, _ = new_model(STOCK)
    assert isinstance(ours, StockForPretraining)
    real = SmolVLMForConditionalGeneration(ours.config.smolvlm()).eval()
    real.model.vision_model.load_state_dict(ours.model.vision_tower.vision_model.state_dict())
    real.model.connector.load_state_dict(ours.model.multi_modal_projector.connector.state_dict())
    real.model.text_model.load_state_dict(ours.model.language_model.state_dict())
    real.lm_head.load_state_dict(ours.lm_head.state_dict())
    bare = StockModel(ours.config).eval()
    bare.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.tensor([[1] + [ours.config.image_token_id] * 12 + [6, 20, 30]])
    pixels = torch.randn(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = real(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(bare(ids, pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-4)


def test_it_learns_by_the_recipe_and_comes_back_as_saved(tmp_path):
    folder = pretrain(STOCK, tmp_path)
    model = StockModel.from_pretrained(folder, dtype=torch.float32)
    fresh, _ = new_model(STOCK)
    trained, drawn = model.state_dict(), fresh.state_dict()
    moved = {name: (trained[name] - drawn[name]).abs().max() for name in trained}
    assert moved["model.vision_tower.vision_model.embeddings.patch_embedding.weight"] > 1e-4
    assert moved["model.multi_modal_projector.connector.modality_projection.proj.weight"] > 1e-4


def test_costs_count_both_stages():
    found = costs(STOCK)
    assert found["train_cpu_s"] > 0
    assert found["train_cpu_s"] == 2 * found["vision_step_s"] + 2 * found["joint_step_s"]
