"""Profiles `small` and `gpu` but for their size: tiny stand-ins for decoder, checkpoint and data."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from little_videos import encode
from transformers import LlamaConfig, LlamaForCausalLM

from vqlora.base import load_base
from vqlora.cost.cards import plan_cards
from vqlora.cost.sizes import CONFIGS
from vqlora.data.clips import Clip, Segment
from vqlora.data.formats import write_activitynet
from vqlora.data.kinemoji.write import write_domain
from vqlora.experiments import AlignSettings, HubSettings, Profile, load_profile
from vqlora.hub import small
from vqlora.hub.checkpoint import read_checkpoint
from vqlora.hub.study import base_of, runs_of
from vqlora.report.checkpoint_tables import checkpoints_table
from vqlora.runs import run_grid
from vqlora.settings_file import ConfigError, parse
from vqlora.steps import needs, planned
from vqlora.store import RunStore
from vqlora.zoo import tiny_model
from vqlora.zoo.checkpoints import letters, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def tiny_decoder():
    """A decoder and a tokenizer with what `small` asks of SmolLM2's."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 4: "<|im_start|>", 5: "<|im_end|>"}
    tokenizer = letters(special)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_the_decoder_and_the_tower_are_those_they_were():
    decoder, tokenizer = tiny_decoder()
    kine = load_base("released")[0]
    decoder.config.quantization_config = {"quant_method": "gguf"}  # as one read from a packed file has
    model, own = small.assemble(decoder, tokenizer, kine)
    assert "quantization_config" not in model.config.text_config.to_dict()
    ids = torch.tensor([own.encode("a dog runs<end_of_utterance>")])
    assert ids[0, -1] == 5  # the decoder's own end of a turn
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :54], decoder(input_ids=ids).logits)
        features = torch.randn(2, 16, kine.config.vision_width)
        tower, wanted = model.model.vision_model, features
        for block in kine.model.vision_tower.layers:
            wanted = block(wanted)
        found = tower.post_layernorm(tower.encoder(inputs_embeds=features).last_hidden_state)
        assert torch.allclose(found, kine.model.vision_tower.norm(wanted), atol=1e-4)


def test_both_stages_learn_and_stop_in_time():
    kine = load_base("released")[0]
    model, _ = small.assemble(*tiny_decoder(), kine)
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(8, 3, 64, 64, generator=generator) * 2 - 1
    losses = small.distil(model, kine, lambda step: shown, 12)
    assert losses[-1] < 0.5 * losses[0]
    ids = torch.tensor([[4, *[model.config.image_token_id] * 4, 10, 11]])
    batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values": shown[None, :1]}
    batch["labels"][:, :-2] = -100
    frozen = model.lm_head.weight.detach().clone()
    losses = small.align(model, lambda step: batch, 12, learning_rate=1e-2)
    assert len(losses) == 12 and losses[-1] < losses[0] and torch.equal(model.lm_head.weight, frozen)
    seconds = iter(range(0, 100, 4))
    assert len(small.align(model, lambda step: batch, 12, limit_s=10.0, clock=lambda: next(seconds))) == 2


def test_small_from_its_base_to_its_runs(tmp_path):
    counts = {"source": {"train": 2}, "visual": {"train": 2, "test": 1}}
    for domain, parts in counts.items():
        write_domain(tmp_path / "data", domain, parts, 0, languages=["en"], audio=False)
    asked = load_profile("small", ROOT).hub[0]
    little = {"clips": 2, "distil_steps": 1, "steps": 1, "batch_size": 1, "frames": 2}
    changed = {
        "align": AlignSettings(**little),
        "seeds": (0,),
        "steps": 1,
        "train_clips": 2,
        "eval_clips": 1,
        "arms": asked.arms[-1:],
        "overrides": {"batch_size": 1, "frames": 2, "compute_dtype": "fp32"},
    }
    asked = asked.model_copy(update=changed)
    base = base_of(asked, tmp_path, decoder=tiny_decoder)
    assert read_checkpoint(base).config.model_type == "smolvlm"
    made = (Path(base) / "losses.json").stat().st_mtime_ns
    assert base_of(asked, tmp_path, decoder=None) == base  # one that is there is taken
    assert (Path(base) / "losses.json").stat().st_mtime_ns == made
    (run,) = runs_of(asked, base)
    assert (run.experiment, run.base, run.frames) == ("14_checkpoints", base, 2)


def test_a_dry_run_of_gpu(tmp_path):
    """Every path but the size: its data format, its arms, what it sets for a card, one of its classes."""
    clips = []
    for n, part in enumerate(("train", "train", "val")):
        path = encode(tmp_path / "videos" / f"v_clip{n}.mp4", 16, seed=n)
        clips.append(Clip(f"v_clip{n}", path, part, {"en": (f"a dog runs {n}",)},
                          segments=(Segment(0.5, 1.5, f"a dog runs {n}"),)))  # fmt: skip
    write_activitynet(tmp_path, clips, durations_s=2.0)
    profile = load_profile("gpu", ROOT)
    asked = profile.hub[2].on(profile.card)
    assert asked.overrides["accumulation"] > 1 and asked.overrides["gradient_checkpointing"]
    source = asked.sources["activitynet"].model_copy(update={"root": str(tmp_path), "size": 32, "fps": 4.0})
    little = {"frames": 2, "accumulation": 2, "warmup_steps": 0, "compute_dtype": "fp32", "threads": 1}
    changed = {
        "sources": {"activitynet": source},
        "seeds": (0,),
        "steps": 1,
        "train_clips": 2,
        "eval_clips": 1,
        "overrides": {**asked.overrides, **little},
    }
    asked = asked.model_copy(update=changed)
    base = str(tiny_checkpoint("qwen2_5_vl", tmp_path / "tiny"))
    runs = run_grid(
        runs_of(asked, base), RunStore(tmp_path / "build"), 0, data_root=tmp_path / "build" / "data"
    )
    assert [run.settings.arm for run in runs] == ["frozen", "lora", "qlora", "vqlora"]
    for run in runs:
        assert 0 < run.metrics["nll"] < 10 and run.metrics["clips"] == 1
        assert run.settings.arm == "frozen" or run.cost["optimizer_bytes"] > 0
    assert runs[2].cost["weight_bytes"] < runs[1].cost["weight_bytes"]


def test_what_gpu_names_is_known_and_planned():
    profile = load_profile("gpu", ROOT)
    for compared in profile.hub:
        assert compared.shape in CONFIGS and {"24GB", "80GB"} == set(compared.cards)
        for card in compared.cards:
            runs = compared.on(card).runs(base=compared.base)
            assert len({run.batch_size * run.accumulation for run in runs}) == 1
    with pytest.raises(ValueError, match="card: '12GB' has no settings; allowed: 24GB, 80GB"):
        profile.hub[0].on("12GB")


def test_every_comparison_of_gpu_was_planned_to_fit_its_cards():
    """`results/gpu_plan.csv` is made by `python -m vqlora.cost.cards`, in minutes; here it is compared."""
    planned_rows = pd.read_csv(ROOT / "results" / "gpu_plan.csv").set_index(["shape", "card", "arm"])
    assert planned_rows.fits.all()
    for compared in load_profile("gpu", ROOT).hub:
        for card in compared.cards:
            for run in compared.on(card).runs(base=compared.base):
                if run.arm == "lora":  # the others hold a quarter of its weights
                    row = planned_rows.loc[compared.shape, card, run.arm]
                    assert (row.bits, row.frames, row.batch) == (run.bits, run.frames, run.batch_size)


def test_plans_of_a_comparison_say_whether_it_fits(monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", lambda: tiny_model("smolvlm").config)
    asked = load_profile("gpu", ROOT).hub[0].model_copy(update={"shape": "tiny"})
    little = {"frames": 2, "batch_size": 1}
    asked = asked.model_copy(update={"cards": {"1.001GB": little, "24GB": little}})
    table = plan_cards(asked, arms=["qlora"])
    assert table.fits.tolist() == [False, True] and table.frames.tolist() == [2, 2]
    assert table.train_gb[0] == table.train_gb[1] > table.room_gb[0]
    with pytest.raises(ValueError, match="shape: None is not known; allowed: Qwen2.5-0.5B"):
        plan_cards(asked.model_copy(update={"shape": None}))


def test_profiles_make_the_notebooks_whose_sections_they_have():
    assert planned("small", ROOT) == ["01_data", "14_checkpoints"] and planned("gpu", ROOT) == [
        "14_checkpoints"
    ]
    assert needs("14_checkpoints", load_profile("gpu", ROOT)) == ()
    assert needs("14_checkpoints", load_profile("small", ROOT)) == ("01_data",)
    assert "14_checkpoints" not in planned("cpu", ROOT)


def test_faults_of_the_new_sections_name_key_value_and_what_is_allowed():
    arm = {"arm": "qlora", "bits": "nf4", "learning_rate": 1e-3}
    hub = {"base": "x", "domains": ["d"], "arms": [arm], "seeds": [0], "steps": 1, "train_clips": 1,
           "eval_clips": 1, "sources": {"d": {"format": "jsonl", "root": "."}}}  # fmt: skip
    assert isinstance(parse(Profile, {"name": "p", "hub": [hub]}, "p.yaml").hub[0], HubSettings)
    for wrong, wanted in (
        ({"bas": "x"}, "hub[0]: unknown key 'bas' (did you mean 'base'?); allowed: domains, arms"),
        ({"align": {"clips": 1, "steps": 1}}, "hub[0]: base: give either a base or align, which makes"),
        ({"sources": {"d": {"format": "jsonlines", "root": "."}}},
         "hub[0].sources.d.format: 'jsonlines' is not one of msrvtt, vatex, activitynet, lsmdc, jsonl ("),
        ({"sources": {}}, "hub[0].domains: 'd' is not in data.domains; allowed: none, there is no data"),
        ({"cards": {"24GB": {"batch": 1}}},
         "cards.24GB: overrides: unknown key 'batch' (did you mean 'batch_size'?)"),
        ({"base": None, "align": {"clps": 1, "steps": 1}},
         "hub[0].align: unknown key 'clps' (did you mean 'clips'?)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            parse(Profile, {"name": "p", "hub": [{**hub, **wrong}]}, "p.yaml")
        assert wanted in str(caught.value)
    with pytest.raises(ConfigError, match="card: '12GB' has no settings; allowed: none"):
        parse(Profile, {"name": "p", "hub": [hub], "card": "12GB"}, "p.yaml")
    with pytest.raises(ConfigError, match="hub: domain 'd' is in two comparisons"):
        parse(Profile, {"name": "p", "hub": [hub, hub]}, "p.yaml")


def test_the_table_has_a_row_of_means_and_one_of_intervals_a_method(tmp_path):
    assert "not run" in checkpoints_table(tmp_path).latex()
    (tmp_path / "14_checkpoints").mkdir()
    rows = [("visual", arm, metric, value, low, value + 1) for arm in ("qlora", "frozen")
            for metric, value, low in (("nll", 2.0, 1.0), ("weight_bytes", 3e8, float("nan")))]  # fmt: skip
    columns = ["domain", "arm", "metric", "value", "low", "high"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "14_checkpoints" / "summary.csv", index=False)
    found = checkpoints_table(tmp_path).rows
    assert found[0][:3] == ("Visual shift", "Frozen", "2.000") and found[2][:2] == ("", "QLoRA, NF4")
    assert "[1.000, 3.000]" in found[1][2] and found[0][6] == "300.0~MB" and found[1][6] == ""
    assert found[0][4] == "n/a"  # a metric that was not read
