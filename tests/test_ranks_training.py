"""Ranks chosen at the start of a run or moved while it trains: ours and peft's, through the Trainer."""

import pytest
import torch
from settings_like import settings_like
from test_train import clips

from vqlora import baselines
from vqlora.adapter import gated_layers
from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.checkpoints import last_whole_checkpoint
from vqlora.config import RunSettings
from vqlora.data.batches import ClipDataset, Collator
from vqlora.identity import imports_of, module_file
from vqlora.modalities import plain_name, target_modules
from vqlora.ranks import runs as rank_runs
from vqlora.ranks.scheduler import RankScheduler
from vqlora.rivals import layer_rows
from vqlora.store import run_key
from vqlora.train import first_batches, train

BUDGET = 15_000


def started(settings):
    """(model with its arm, dataset, collator) of a tiny run."""
    model, tokenizer = tiny()
    made, store = clips()
    data = ClipDataset(made, store, settings.frames, "jittered", seed=settings.seed)
    collator = Collator(tokenizer, seed=settings.seed, question_share=settings.question_share)
    model = prepare(model, settings)
    model = attach(model, settings, lambda: first_batches(data, collator, settings, "cpu", count=3))
    return model, data, collator


def like(ranks="gradient", arm="vqlora", bits="nf4", **overrides):
    more = {"ranks": ranks, "gate": "none"} if arm == "vqlora" else {}
    return settings_like(arm, bits, **{"budget": BUDGET, "contrastive_weight": 0.0, **more, **overrides})


def test_an_allocation_is_made_from_the_batches_that_training_begins_with():
    settings = like(steps=3)
    model, data, collator = started(settings)
    ranks = baselines.ranks(model, settings)
    assert list(ranks) == target_modules(tiny()[0]) and len(set(ranks.values())) > 2
    spent = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.97 * BUDGET <= spent <= BUDGET == model.peft_config["default"].allocation["budget"]
    assert baselines.callbacks(model, settings) == []
    same, other = (baselines.ranks(started(like(seed=seed))[0], settings) for seed in (0, 5))
    assert same == ranks != other


@pytest.mark.parametrize("word", ["uniform", "relative", "quantization"])
def test_allocators_by_name(word, monkeypatch):
    if word == "relative":
        names = target_modules(tiny()[0])
        kept = dict.fromkeys(names, 1.0)
        monkeypatch.setattr("vqlora.ranks.allocate._reference", lambda model, given: kept)
    if word == "quantization":
        monkeypatch.setattr(rank_runs, "load_base", lambda name: tiny())
    model, *_ = started(like(word))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= BUDGET


def trained(settings, work, steps_to_save=2, **more):
    model, data, collator = started(settings)
    given = train(model, settings, data, collator, work, save_steps=steps_to_save, **more)
    return model, given


def test_scheduled_ranks_move_within_the_budget_and_the_rest_stays_silent(tmp_path):
    settings = like("scheduled", steps=6, learning_rate=3e-3)
    model, given = trained(settings, tmp_path)
    ranks, layers = baselines.ranks(model, settings), dict(gated_layers(model))
    spent = sum((layers[name].in_features + layers[name].out_features) * rank for name, rank in ranks.items())
    assert 0.97 * BUDGET <= spent <= BUDGET
    assert spent == model.peft_config["default"].allocation["spent"]
    assert len(set(ranks.values())) > 2  # they began alike
    for name, layer in layers.items():
        used = layer.lora_B["default"].weight.abs().sum(dim=0) > 0
        assert int(used.sum()) <= ranks[name] <= layer.r["default"]
    assert given["train_loss"] < 3


def test_a_scheduled_run_goes_on_with_the_ranks_it_had(tmp_path):
    settings = like("scheduled", steps=6)
    whole, _ = trained(settings, tmp_path / "whole")
    for later in ("checkpoint-6",):
        (tmp_path / "whole" / "checkpoints" / later / "complete.json").unlink()
    assert last_whole_checkpoint(tmp_path / "whole" / "checkpoints").name == "checkpoint-4"
    resumed, given = trained(settings, tmp_path / "whole")
    assert given["steps_here"] == 2
    assert baselines.ranks(resumed, settings) == baselines.ranks(whole, settings)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_schedule_without_its_state_or_without_room_is_refused():
    model, *_ = started(like("scheduled"))
    state = type("State", (), {"global_step": 3})()
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint"):
        RankScheduler(BUDGET, steps=6).on_train_begin(None, state, None, model=model)
    state.global_step = 0
    with pytest.raises(ValueError, match="pays for no rank"):
        RankScheduler(3, steps=6).on_train_begin(None, state, None, model=model)
    with pytest.raises(ValueError, match="gate: 'rank' does not go with ranks that move"):
        started(like("scheduled", gate="rank"))


def test_adalora_is_called_and_changes_its_ranks(tmp_path):
    settings = like(arm="adalora", steps=12, learning_rate=3e-3)
    model, _ = trained(settings, tmp_path)
    config, ranks = model.peft_config["default"], baselines.ranks(model, settings)
    assert sorted(ranks) == sorted(target_modules(tiny()[0]))
    assert config.total_step == 12 and config.init_r == 3 and config.target_r == 2
    assert sum(ranks.values()) == config.target_r * len(ranks) and len(set(ranks.values())) > 1
    assert last_whole_checkpoint(tmp_path / "checkpoints") is None  # peft cannot go on from one


def test_adalora_that_never_reallocates_is_a_fault(tmp_path, monkeypatch):
    settings = like(arm="adalora", steps=12)
    monkeypatch.setattr("peft.tuners.adalora.AdaLoraModel.update_and_allocate", lambda self, step: None)
    with pytest.raises(RuntimeError, match="every layer still has rank 3 after 12 steps"):
        trained(settings, tmp_path)


def test_eva_gives_ranks_within_the_budget_on_the_vision_tower_too(tmp_path):
    settings = like(arm="eva", steps=2)
    model, *_ = started(settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = baselines.ranks(model, settings)
    assert 0.95 * BUDGET < trainable <= BUDGET and len(set(ranks.values())) > 1
    assert any("vision_tower" in name and rank for name, rank in ranks.items())
    adapted = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    name, layer = next((n, m) for n, m in adapted if "vision_tower" in n)
    a = layer.lora_A["default"].weight
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "as for every arm"
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-3, rtol=0)  # principal directions
    assert plain_name(name) in ranks and not layer.lora_B["default"].weight.any()


def test_eva_reads_real_tokens_of_text_and_all_rows_of_frames():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert layer_rows((torch.ones(2, 3, 5),), mask, "text").shape == (3, 5)
    assert layer_rows((torch.ones(4, 6, 5),), mask, "vision").shape == (24, 5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"arm": "qlora", "ranks": "gradient", "budget": 9}, "ranks: 'gradient' does not go with arm"),
        ({"arm": "vqlora", "ranks": "gradient"}, "budget: missing"),
        ({"arm": "eva"}, "budget: missing"),
        ({"arm": "adalora", "budget": 9, "bits": "int8"}, "bits: 'int8'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings_like(**settings)


def test_budgets_too_small_for_the_rivals_are_told():
    for arm in ("adalora", "eva"):
        with pytest.raises(ValueError, match=f"budget: 50; arm '{arm}' needs"):
            started(like(arm=arm, budget=50))


def test_other_runs_keep_their_identity():
    plain = settings_like("vqlora", gate="none")
    before = run_key(plain, "data", "base", "code")
    assert before == run_key(plain.model_copy(update={"label": "ours"}), "data", "base", "code")
    keys = {run_key(like(word), "data", "base", "code") for word in ("gradient", "uniform", "entropy")}
    assert len(keys | {before}) == 4
    added = {"label", "ranks", "rank_ratio", "budget"}
    assert added < set(RunSettings.model_fields)
    dump = plain.model_dump(mode="json")
    assert all(dump[name] is None for name in added)


def test_other_arms_do_not_depend_on_the_code_of_ranks():
    import ast

    waiting, seen = ["vqlora.train"], set()
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if path is None or name in seen:
            continue
        seen.add(name)
        waiting.extend(imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py"))
    assert not [name for name in seen if name.startswith(("vqlora.ranks", "vqlora.rivals", "vqlora.adapter"))]
