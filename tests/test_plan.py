"""The planner: held to the allocator's measurements, to itself, and to arithmetic done by hand."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from vqlora import cli, cost
from vqlora.adapter import VQLoraConfig
from vqlora.base import tiny
from vqlora.cost.check import check_plan
from vqlora.cost.follow import Follow
from vqlora.cost.inputs import batch_bytes, clip_batch, prompt_only
from vqlora.cost.optimizers import OPTIMIZERS, optimizer_plan
from vqlora.cost.plan import plan_memory, read_bytes
from vqlora.cost.scratch import scratch_bytes
from vqlora.cost.search import largest
from vqlora.cost.shapes import Shapes
from vqlora.cost.sizes import STATED
from vqlora.cost.steps import follow_last_token, follow_prefill
from vqlora.zoo import tiny_batch, tiny_model

SMALL = {"frames": 2, "prompt": 4, "answer": 4, "batch": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model():
    return tiny()[0]


@pytest.fixture(scope="module")
def plan(model):
    return plan_memory(model, VQLoraConfig(r=4, gate="none"), dtype="fp32", **SMALL)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": "nf4", "dtype": "fp32", "adapter_config": VQLoraConfig(r=4, gate="rank")},
        {"bits": "int8", "dtype": "fp32", "gradient_checkpointing": True},
        {"full": True, "dtype": "fp32"},
    ],
    ids=["nf4", "int8", "full"],
)
def test_plan_is_within_a_tenth_of_the_allocator(settings):
    found = check_plan(lambda: tiny()[0], **SMALL, **settings).set_index("part")
    assert abs(found.ratio["training peak"] - 1) < 0.1 and abs(found.ratio["generation peak"] - 1) < 0.1
    for part in ("weights", "constants", "adapters", "optimizer", "inputs", "activations", "gradients"):
        row = found.loc[f"training {part}"]
        assert row.predicted_bytes == row.measured_bytes, part
    assert found.ratio["step FLOPs"] == found.ratio["token FLOPs"] == 1
    assert found.measured_bytes["resident peak"] >= 0  # 0 where this process has held more before


def test_parts_sum_to_the_peak_and_static_parts_are_the_models_own(model, plan):
    assert sum(plan.training.values()) == plan.train_bytes > plan.inference_bytes
    assert plan.table().loc["peak"].tolist() == [plan.train_bytes, plan.inference_bytes]
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trainable * 4 == plan.training["adapters"] and plan.training["constants"] > 0
    assert plan.training["optimizer"] >= 8 * plan.trainable
    batch = clip_batch(model, 2, 2, 4, 4)
    assert plan.training["inputs"] == batch_bytes(batch) and plan.tokens == batch["input_ids"].shape[1]


def test_more_of_anything_takes_more(plan):
    for changes in ({"frames": 4}, {"batch": 4}, {"adapter": VQLoraConfig(r=8, gate="none")}):
        more = plan.replace(**changes)
        assert more.train_bytes > plan.train_bytes and more.inference_bytes > plan.inference_bytes, changes
    longer = plan.replace(frames=16, batch=8)
    assert longer.replace(gradient_checkpointing=True).train_bytes < longer.train_bytes
    assert plan.replace().to_dict() == plan.to_dict()  # nothing was left behind by the others


@pytest.mark.parametrize("bits", ["bf16", "int8"])
def test_work_and_trainable_parameters_do_not_depend_on_bits(plan, bits):
    other = plan.replace(bits=bits)
    for name in ("step_flops", "token_flops", "parameters", "trainable"):
        assert getattr(other, name) == getattr(plan, name) > 0, name
    assert other.training["weights"] > plan.training["weights"]


def test_fit_is_the_largest_that_fits(plan):
    room = plan.replace(batch=5).train_bytes
    found = plan.fit(room)
    assert found["batch"] == 5
    frames = found["frames"]
    assert plan.replace(frames=frames).train_bytes <= room < plan.replace(frames=frames + 1).train_bytes
    least = plan.replace(batch=1).train_bytes
    assert plan.fit(least, reserve=1) == {"batch": 0, "frames": 0}


def test_advice_is_ordered_and_true(plan):
    table = plan.advice(plan.train_bytes - 1)
    assert table.saves_bytes.is_monotonic_decreasing and (table.saves_bytes > 0).all() and table.fits.all()
    halved = table[table.change.str.startswith("batch 1")].iloc[0]
    assert halved.train_bytes == plan.replace(batch=1).train_bytes


@pytest.mark.parametrize("limit", [-1, 0, 9, 10, 99, 100, 12345])
def test_largest_against_trying_all(limit):
    for size in (lambda n: 10 * n, lambda n: n * n, lambda n: 50 + n // 3, lambda n: 40 * math.isqrt(n)):
        tried = [n for n in range(1, 400) if size(n) <= limit]
        assert largest(size, limit, cap=399) == max(tried, default=0)


def test_sizes_of_cards():
    assert read_bytes("24GB") == read_bytes("24 GiB") == 24 * 2**30 == read_bytes(24 * 2**30)
    with pytest.raises(ValueError, match="'a lot'"):
        read_bytes("a lot")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"bits": "int3"}, "bits: 'int3'.*nf4"),
        ({"dtype": "fp8"}, "dtype: 'fp8'"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"optimizer": "magic"}, "optimizer: 'magic'.*adamw_torch"),
        ({"full": True, "adapter_config": LoraConfig()}, "full"),
        ({"batch": 0}, "batch: 0"),
        ({"tokens_per_frame": 7}, "tokens_per_frame: 7.*makes 4"),
    ],
)
def test_mistakes_name_the_argument_and_what_is_allowed(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        plan_memory(model, **arguments)


def test_a_source_that_is_not_there():
    with pytest.raises(ValueError, match="no/such/model: no configuration"):
        plan_memory("no/such/model")


def test_text_decoders_and_classes_that_are_not_known_here():
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                         vocab_size=256)  # fmt: skip
    short = plan_memory(config, frames=0, prompt=8, answer=8)
    long = plan_memory(config, frames=4, tokens_per_frame=16, prompt=8, answer=8)
    assert (short.tokens, long.tokens) == (16, 80) and long.train_bytes > short.train_bytes
    assert long.inference["cache"] > 0 == long.training.get("cache", 0)
    other = tiny_model("video_llama_3")
    with pytest.raises(ValueError, match="video_llama_3.*inputs="):
        plan_memory(other)
    own = plan_memory(other, inputs=lambda batch, frames: tiny_batch("video_llama_3", other, batch, frames))
    assert own.train_bytes > 0


def followed(model, batch, shapes=None):
    with Follow(model, shapes=shapes) as seen:
        loss = model(**batch).loss
        seen.phase = "backward"
        loss.backward()
    model.zero_grad(set_to_none=True)
    return seen


@pytest.mark.parametrize("name", ["smolvlm", "llava_onevision", "instructblipvideo", "qwen2_5_vl"])
def test_shapes_take_what_values_take(name):
    """Without a weight's value, every storage of a step comes and goes as it does with them."""
    real = tiny_model(name).train()
    batch = tiny_batch(name, real)
    shapes = Shapes()
    from transformers.initialization import no_init_weights

    with shapes, no_init_weights():
        other = type(real)(copy.deepcopy(real.config)).train()
        other.tie_weights()
    one, two = followed(real, batch), followed(other, batch, shapes)
    assert one.peak_parts() == two.peak_parts() and one.flops == two.flops
    assert cost.static_bytes(real)["total"] == cost.static_bytes(other)["total"]


def test_followed_parts_of_a_known_step():
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(8, 64)
    with Follow(layer) as seen:
        y = F.relu(layer(x))
        z = y.square().sum()
        seen.phase = "backward"
        z.backward()
    parts = seen.peak_parts()
    assert parts["gradients"] == 4 * 64 * 32 and sum(parts.values()) == seen.peak_bytes
    assert seen.flops.total() == 2 * 2 * 8 * 64 * 32


def test_a_frozen_head_asked_for_the_last_token_copies_its_weight_for_each_row_in_bfloat16():
    weight, x = torch.randn(4096, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()[:, -1:]
    peaks = []
    for device in ("cpu", "cuda"):
        with torch.no_grad(), Follow(scratch=partial(scratch_bytes, device=device)) as seen:
            F.linear(x, weight)
        peaks.append(seen.peak_bytes)
    copies, result = 2 * 2 * 4096 * 64, 2 * 2 * 4096
    assert peaks == [copies + x.nbytes + result, result]  # the rows, too, are copied: they lie apart
    with torch.no_grad():
        taken = cost.step_bytes(lambda: F.linear(x, weight))
    if taken < copies:
        pytest.skip("this CPU's kernels take the weight as it lies")
    assert peaks[0] == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("name", ["kinevlm", "smolvlm", "idefics2", "llava_next_video", "video_llava",
                                  "internvl", "qwen2_5_vl", "qwen3_vl"])  # fmt: skip
def test_batches_are_what_the_classes_want(name):
    model = tiny_model(name)
    batch = clip_batch(model, 2, 4, 6, 5)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
    assert (batch["labels"] != -100).sum() == 10
    assert prompt_only(batch, 5)["input_ids"].shape[1] == batch["input_ids"].shape[1] - 5
    one, before = follow_last_token(model, batch), follow_prefill(model, batch, 5)
    assert 0 < one.flops < before.flops / 5 and one.peak_bytes > 0


def test_optimizer_state_is_what_torch_keeps():
    params = [nn.Parameter(torch.ones(96, 64)), nn.Parameter(torch.ones(7))]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    sizes = [param.shape for param in params]
    assert optimizer_plan("adamw_torch", sizes, "cpu")[0] == cost.optimizer_bytes(optimizer)
    assert optimizer_plan("adamw_8bit", sizes)[0] == 2 * 96 * 64 + 8 * 24 + 8 * 7
    assert all(optimizer_plan(name, [])[0] == 0 for name in OPTIMIZERS)


def test_the_commands_table_and_json(model, tmp_path, capsys):
    model.config.save_pretrained(tmp_path)
    name = str(tmp_path)
    assert cli.main(["plan", name, "--frames", "2", "--rank", "2", "--card", "100kB"]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown and "does not fit on 100kB" in shown and "largest batch: 0" in shown
    assert cli.main(["plan", name, "--full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train_bytes"] == sum(found["training"].values())
    assert found["trainable"] == sum(p.numel() for p in model.parameters())
    assert cli.main(["plan", "released", "--bits", "int3"]) == 1
    assert "allowed: nf4" in capsys.readouterr().err


def test_the_stated_table_is_four_bytes_a_parameter_and_sixty_percent_less():
    for size, (_, fp16, qlora) in STATED.items():
        assert fp16 / float(size.removesuffix("B")) == 4 and math.isclose(1 - qlora / fp16, 0.6)
