"""Decoding over a paged cache on the CPU: a sequence's bits are its own."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops

BLOCK, HEADS, KV_HEADS, DIM = 16, 8, 2, 64
LENGTHS = (1300, 3, 0, 511, 512, 513, 9000)  # one range of keys, several, and as many as there are


def cache(dtype: torch.dtype):
    make = torch.Generator().manual_seed(0)
    counts = [-(-length // BLOCK) for length in LENGTHS]
    k, v = torch.randn(2, sum(counts), BLOCK, KV_HEADS, DIM, generator=make).to(dtype)
    blocks = torch.randperm(sum(counts), generator=make).int().split(counts)
    table = torch.stack([torch.nn.functional.pad(b, (0, max(counts) - len(b))) for b in blocks])
    return k, v, table, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_depends_neither_on_the_batch_nor_on_the_threads(dtype, threads, isa):
    k, v, table, lens = cache(dtype)
    q = torch.randn(len(LENGTHS), HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = ops.paged_attention(q, k, v, table, lens)
    assert not whole[LENGTHS.index(0)].any()
    for n in (1, 2, 5, 16):
        threads(n)
        assert torch.equal(ops.paged_attention(q, k, v, table, lens), whole)
        for i in range(len(LENGTHS)):
            alone = ops.paged_attention(q[i : i + 1], k, v, table[i : i + 1], lens[i : i + 1])
            assert torch.equal(alone[0], whole[i])


def test_beside_a_prompt(isa):
    """A batch of a long prompt and single tokens: each sequence by the kernel that suits it."""
    k, v, table, lens = cache(torch.float32)
    counts = [1, 2, 0, 200, 1, 8, 1]  # new tokens of each sequence; 200 are too many for the decode kernel
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), HEADS, DIM, generator=torch.Generator().manual_seed(1))
    whole = ops.paged_attention(q, k, v, table, lens, cu_seqlens_q=starts, causal=True)
    for i, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
        alone = ops.paged_attention(
            q[begin:end], k, v, table[i : i + 1], lens[i : i + 1],
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32), causal=True,
        )  # fmt: skip
        if counts[i] <= 8:
            assert torch.equal(alone, whole[begin:end])
        else:  # how a prompt is divided depends on what else there is to do
            torch.testing.assert_close(alone, whole[begin:end])
