"""Attention's backward kernels where the registry's samples do not take them: each of their tiles (csrc/cuda/
attention_backward_tiles.cuh) with several tiles on both sides, the deterministic way (by default dQ is summed by atomic
additions), and the same bits under every schedule."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import llmcore
from llmcore.ops import registry
from llmcore.ops.block_mask import BlockMask
from llmcore.ops.registry import Sample
from tests.ops.checks import check_sample, copied, run_with_gradients
from tests.simt.emulation import MODES, emulator

BY_DEFAULT = registry["attention"]
DETERMINISTIC = dataclasses.replace(BY_DEFAULT, op=functools.partial(BY_DEFAULT.op, deterministic=True))
both_ways = pytest.mark.parametrize("spec", [BY_DEFAULT, DETERMINISTIC], ids=["fused", "deterministic"])


def sample(label, seq_q, seq_k, heads, kv_heads, dim, v_dim, **kwargs):
    make = torch.Generator().manual_seed(0)
    shapes = ((1, seq_q, heads, dim), (1, seq_k, kv_heads, dim), (1, seq_k, kv_heads, v_dim))
    args = tuple(torch.randn(*shape, generator=make).bfloat16() for shape in shapes)
    return Sample(label, args, {"return_lse": True, **kwargs}, (0, 1, 2))


def blocks(rows, columns):
    return torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.4


SAMPLES = [
    sample("64", 280, 270, 2, 1, 64, 64, causal=True),
    sample("96", 150, 200, 2, 1, 96, 96, causal=True),
    sample("128", 140, 270, 2, 1, 128, 128, softcap=20.0),
    sample("192/128", 130, 140, 1, 1, 192, 128),
    sample("256, negative scale", 130, 140, 1, 1, 250, 160, causal=True, scale=-0.05),
    sample("in slices, 300/270", 70, 90, 1, 1, 300, 270, causal=True),
    sample("in slices, 4/320", 40, 90, 1, 1, 4, 320),
    sample("blocks as wide as tiles", 280, 270, 2, 1, 64, 64, block_mask=BlockMask(blocks(3, 3), 128, 128)),
    sample("blocks of one score", 70, 40, 2, 1, 64, 64, block_mask=BlockMask(blocks(70, 40), 1, 1)),
]


@pytest.mark.parametrize("emulated", [("random", "random")], indirect=True, ids="-".join)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
@both_ways
def test_every_tile_matches_the_reference(spec, sample, emulated):
    with llmcore.backend("kernel"):
        check_sample(spec, sample)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(s, id=f"{d}-{s.label}")
        for d in BY_DEFAULT.dtypes["cuda"]
        for s in BY_DEFAULT.samples(d, "cpu")
        if not s.cpu_only
    ],
)
def test_the_registry_deterministically(sample, emulated):
    """The default is what test_registry.py runs."""
    with llmcore.backend("kernel"):
        check_sample(DETERMINISTIC, sample)


def gradients_under_every_schedule(spec):
    attention = sample("two warps share columns", 140, 200, 4, 2, 128, 128, causal=True)
    seeds = [torch.ones(1, 140, 4, 128), torch.ones(1, 4, 140)]
    for mode in MODES:
        with emulator(*mode, seed=2), llmcore.backend("kernel"):
            yield run_with_gradients(spec.op, copied(attention), seeds)[1]


def test_the_same_bits_under_every_schedule():
    first, *others = gradients_under_every_schedule(DETERMINISTIC)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_fused_the_same_bits_of_dk_and_dv_under_every_schedule():
    first, *others = gradients_under_every_schedule(BY_DEFAULT)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[1:], other[1:], strict=True))


def test_the_two_ways_differ_in_the_order_of_dq():
    """So that neither is tested under the other's name."""
    fused, deterministic = (next(gradients_under_every_schedule(spec)) for spec in (BY_DEFAULT, DETERMINISTIC))
    assert not torch.equal(fused[0], deterministic[0])
