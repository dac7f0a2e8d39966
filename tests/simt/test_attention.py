"""Attention's CUDA kernels where the registry's samples do not lead: every row of the tile table, the second round of
loops that those samples leave after one, and exponents that make the kernel rescale, or not."""

from __future__ import annotations

import pytest
import torch

from llmcore.ops import BlockMask, registry
from llmcore.ops.registry import HALVES, Sample
from tests.ops.checks import check_sample


def dense(label, seq_q, seq_k, heads, kv_heads, dim, v_dim=None, **kwargs):
    def make(dtype, randn):
        q, k, v = randn(seq_q, heads, dim), randn(seq_k, kv_heads, dim), randn(seq_k, kv_heads, v_dim or dim)
        tensors = tuple(t[None].to(dtype) for t in (q, k, v))
        return Sample(label, tensors, {"return_lse": True, **kwargs})

    return label, make


def rising(dtype, randn):
    """Scores that grow along the keys: by less than the lag from tile to tile for one head, by more for the other."""
    q, k, v = randn(1, 20, 2, 64), randn(1, 400, 1, 64), randn(1, 400, 1, 64)
    k[..., 0] = torch.arange(400)[:, None] / 16
    q[:, :, 0, 0], q[:, :, 1, 0] = 6, 30
    return Sample("rising", tuple(t.to(dtype) for t in (q, k, v)), {"return_lse": True})


def many_sequences(dtype, randn):
    """More sequences than a warp has lanes."""
    lengths = torch.tensor([0, 3, 1, 40] * 11 + [2, 70])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tensors = tuple(randn(int(cu[-1]), heads, 64).to(dtype) for heads in (2, 1, 1))
    return Sample("many sequences", tensors, {"cu_seqlens_q": cu, "causal": True, "return_lse": True})


CASES = dict([
    dense("96, fewer queries", 70, 100, 4, 2, 96, causal=True),
    dense("90: padded to 96, staged by element", 30, 70, 2, 1, 90),
    dense("128, window", 140, 200, 2, 1, 128, causal=True, window=70),
    dense("192/128", 130, 130, 1, 1, 192, 128, causal=True),
    dense("256, softcap", 40, 130, 2, 1, 256, softcap=3.0),
    dense("any: two groups of V", 10, 130, 2, 1, 80, 300, causal=True),
    dense("more heads than rows", 2, 70, 150, 1, 64, causal=True),
    dense("negative scale", 20, 70, 2, 1, 64, causal=True, scale=-0.2),
    dense("scale 0", 20, 70, 2, 1, 64, causal=True, scale=0.0),
    dense("block-sparse, more than 32 tiles", 16, 2300, 1, 1, 16,
          block_mask=BlockMask(torch.arange(36)[None, None, None] % 34 == 1, 16, 64)),
    ("rising", rising),
    ("many sequences", many_sequences),
])  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("label", CASES)
def test_attention(label, dtype, emulated):
    make = torch.Generator().manual_seed(0)
    check_sample(registry["attention"], CASES[label](dtype, lambda *shape: torch.randn(*shape, generator=make)))
