"""Row lengths that the registry's samples, which are small, leave out: one for every team of threads that
csrc/cuda gives a row to, and rows that no team can hold."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore import reference
from llmcore.ops import Sample, registry
from llmcore.ops.registry import FLOATS
from tests.ops.checks import check_sample

# Multiples of 8 (16 where 8 bits are written) are read 16 bytes at a time; 8200 and 4101 are longer than the largest
# team holds.
LENGTHS = (128, 264, 1040, 4104, 8200, 259, 2051, 4101)


def samples(name: str, dim: int, dtype: torch.dtype):
    make = torch.Generator().manual_seed(dim)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(dtype)

    x, weight, bias = randn(35, dim), randn(dim), randn(dim)
    if name == "dyt":
        alpha = torch.tensor([0.5], dtype=dtype)
        yield Sample(f"{dim}", (x, alpha, weight, bias), differentiable=(0, 1, 2, 3))
    if name == "rms_norm":
        yield Sample(f"{dim}", (x, weight), differentiable=(0, 1))
        yield Sample(f"{dim}, residual", (x, weight, 1e-6, randn(35, dim)), differentiable=(0, 1, 3))
    if name == "layer_norm":
        yield Sample(f"{dim}", (x + 10, weight, bias, 1e-5, randn(35, dim)), differentiable=(0, 1, 2, 4))
    if name == "kv_cache_write":
        k, v, slots = randn(3, 2, dim), randn(3, 2, dim), torch.tensor([5, 0, 3])
        for cache_dtype in (*reference.LARGEST_ELEMENT, dtype):
            k_cache, v_cache = torch.zeros(2, 2, 3, 2, dim, dtype=cache_dtype)
            scaled = cache_dtype in reference.LARGEST_ELEMENT
            scales = {"k_scale": torch.zeros(2, 3, 2), "v_scale": torch.zeros(2, 3, 2)} if scaled else {}
            yield Sample(f"{dim}, {cache_dtype}", (k, v, k_cache, v_cache, slots), scales)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dim", LENGTHS)
@pytest.mark.parametrize("name", ["dyt", "kv_cache_write", "layer_norm", "rms_norm"])
def test_row_length(name, dim, dtype, emulated):
    for sample in samples(name, dim, dtype):
        with llmcore.backend("kernel"), torch.random.fork_rng():
            check_sample(registry[name], sample)
