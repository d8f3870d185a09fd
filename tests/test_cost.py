import math
import weakref

import pytest
import torch
from settings_like import settings_like
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqlora import cost
from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.quantize import load_quantized


class Followed(TorchDispatchMode):
    """A second way to the same number: follows every storage made inside until it is freed."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            self.watch(leaf, 0)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self.watch(leaf, None)
        return out

    def watch(self, leaf, size):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes() if size is None else size
                self.now += self.alive[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.alive.pop(key, 0)


def test_static_bytes_of_a_known_layer():
    layer = nn.Linear(256, 128, bias=False)
    held = cost.static_bytes(layer)
    assert held == {
        "weights": 0,
        "trainable": 256 * 128 * 4,
        "constants": 0,
        "buffers": 0,
        "total": 256 * 128 * 4,
    }
    layer.register_buffer("twice", layer.weight.data)  # shared storage counts once
    assert cost.static_bytes(layer)["total"] == 256 * 128 * 4


@pytest.mark.parametrize("double_quant", [False, True])
def test_constants_are_counted(double_quant):
    model = load_quantized(tiny()[0], "nf4", double_quant=double_quant)
    layer = model.model.language_model.layers[0].mlp.gate_proj
    count = 64 * 192
    blocks = count // 64
    scales = blocks + 4 * math.ceil(blocks / 256) + 256 * 4 + 4 if double_quant else 4 * blocks
    assert cost.parameter_count(layer.weight) == count
    assert cost.tensor_bytes(layer.weight) == count // 2 + scales + 16 * 4
    footprint = model.get_memory_footprint()
    held = cost.static_bytes(model)
    assert held["total"] - held["constants"] <= footprint < held["total"]


def test_int8_bytes_do_not_change_with_the_first_forward():
    model = load_quantized(tiny()[0], "int8")
    before = cost.static_bytes(model)
    ids = torch.tensor([[1, 9, 10, 5]])
    model(ids)
    assert cost.static_bytes(model) == before and before["constants"] > 0


def test_step_bytes_against_a_hand_count_and_a_second_method():
    size = 1 << 16

    def step():
        a = torch.empty(size)  # 4 bytes each
        b = torch.empty(size)
        del a
        return torch.empty(2 * size), b

    assert cost.step_bytes(step) == 12 * size
    table, ids = nn.Embedding(700, 64), torch.randint(0, 700, (1000,))

    def loss():
        F.cross_entropy(table(ids) @ table.weight.T, ids).backward()
        table.zero_grad(set_to_none=True)

    with Followed() as followed:
        loss()
    assert cost.step_bytes(loss) == followed.peak > 4 * 1000 * 700


def test_step_bytes_sees_more_under_a_larger_batch():
    model = tiny()[0]
    sizes = [
        cost.step_bytes(
            lambda n=n: model(torch.ones(n, 16, dtype=torch.long), use_cache=False).logits.sum().backward()
        )
        for n in (1, 4)
    ]
    assert sizes[1] > 1.5 * sizes[0]


def test_flops_of_known_operations():
    x, w = torch.randn(8, 64), torch.randn(32, 64)
    assert cost.count_flops(lambda: x @ w.T) == 2 * 8 * 64 * 32
    q = torch.randn(2, 4, 16, 32)
    assert cost.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 4 * 16 * 16 * 32


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_quantized_forward_counts_what_16_bit_counts(bits):
    ids = torch.ones(2, 8, dtype=torch.long)

    def flops(bits):
        model = load_quantized(tiny()[0], bits).eval()
        with torch.no_grad():
            return cost.count_flops(lambda: model(ids, use_cache=False))

    assert flops(bits) == flops("bf16") > 0


def test_attention_counts_alike_fused_and_written_out():
    model, ids = tiny()[0].eval(), torch.ones(2, 8, dtype=torch.long)
    found = []
    for how in ("sdpa", "eager"):
        model.set_attn_implementation(how)
        with torch.no_grad():
            found.append(cost.count_flops(lambda: model(ids, use_cache=False)))
    assert found[0] == found[1] > 0


def test_backward_of_qlora_counts_what_lora_counts():
    found = []
    for arm, bits in (("lora", "bf16"), ("qlora", "nf4"), ("qlora", "int8")):
        settings = settings_like(arm, bits)
        model = attach(prepare(tiny()[0], settings), settings).train()
        ids = torch.ones(2, 8, dtype=torch.long)
        found.append(
            cost.count_flops(lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss.backward())
        )
    assert found[0] == found[1] == found[2] > 0


def test_resident_set():
    cost.reset_resident_peak()
    before = cost.resident_peak_bytes()
    block = torch.ones(50_000_000)
    assert cost.resident_peak_bytes() - before > 150_000_000 and cost.resident_bytes() > block.nbytes
    assert cost.device_memory()["resident_peak_bytes"] >= cost.resident_bytes() - block.nbytes
    with cost.cpu_seconds() as taken:
        sum(range(100_000))
    assert taken["cpu_s"] > 0 and taken["wall_s"] > 0
