"""The CPU's forward pass where keys take several blocks and each worker has tasks of its own: the registry's samples
are too small for that."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import BlockMask
from llmcore.ops.registry import Sample, registry
from tests.ops.checks import check_sample

SEQ, HEADS, KV_HEADS, DIM, V_DIM = 450, 4, 2, 320, 288  # 128 or 256 keys in a block
MAKE = torch.Generator().manual_seed(0)
BLOCKS = torch.rand(1, HEADS, -(-SEQ // 24), -(-SEQ // 40), generator=MAKE) < 0.4

CASES = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 70},
    "window both ways": {"window": 33},
    "wide window": {"causal": True, "window": 300},
    "sinks": {"causal": True, "sinks": torch.linspace(-3, 9, HEADS)},
    "softcap": {"causal": True, "softcap": 5.0},
    "negative scale": {"causal": True, "scale": -0.05},
    "small blocks": {"block_mask": BlockMask(BLOCKS, 24, 40)},
    "large blocks": {"block_mask": BlockMask(BLOCKS[:, :1, :2, :3], 230, 170), "causal": True},
}


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    shapes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM)
    return [torch.randn(1, SEQ, *shape, generator=make).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name, dtype, isa, threads):
    threads(2)
    with llmcore.backend("kernel"):
        check_sample(registry["attention"], Sample(name, tuple(operands(dtype)), CASES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0.2, 3.0, 40.0])
def test_rising_scores(step, dtype, isa):
    """Scores that rise from key to key, by little, so that sums are rarely rescaled, and by much."""
    q, k, v = operands(dtype)
    q[..., 0], k[..., 0] = DIM**0.5, torch.arange(SEQ)[None, :, None] * step
    with llmcore.backend("kernel"):
        check_sample(registry["attention"], Sample(f"rising by {step}", (q, k, v), {"causal": True}))


def test_nan_reaches_its_rows_alone(isa):
    q, k, v = operands(torch.float32)
    want = llmcore.ops.attention(q, k, v, causal=True)
    k[0, 200, 0, 5] = torch.nan
    got = llmcore.ops.attention(q, k, v, causal=True)
    assert got[0, 200:, :2].isnan().all()
    assert torch.equal(got[0, :200], want[0, :200])
    assert torch.equal(got[0, :, 2:], want[0, :, 2:])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_number_of_threads(n, isa, threads):
    """Every row is done once, however the tasks are divided."""
    q, k, v = operands(torch.float32)
    threads(1)
    want = llmcore.ops.attention(q, k, v, causal=True)
    threads(n)
    torch.testing.assert_close(llmcore.ops.attention(q, k, v, causal=True), want)
