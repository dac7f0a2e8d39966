"""Cards with less shared memory for a CTA (99 KiB on sm_86 and sm_89): other tiles, the same results."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import llmcore
from llmcore.ops import Sample, registry
from tests.ops.checks import check_sample
from tests.simt.emulation import emulator


@pytest.fixture(params=[99, 163])
def small_card(request):
    with emulator(shared_bytes=request.param * 1024):
        yield


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_attention(small_card, dim, v_dim, deterministic):
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 1, d, generator=make).bfloat16() for d in (dim, dim, v_dim))
    sample = Sample(f"{dim}/{v_dim}", (q, k, v), {"causal": True}, (0, 1, 2))
    spec = registry["attention"]
    spec = dataclasses.replace(spec, op=functools.partial(spec.op, deterministic=deterministic))
    with llmcore.backend("kernel"):
        check_sample(spec, sample)


@pytest.mark.parametrize(
    ("heads", "dim", "v_dim", "latent"),
    [
        (8, 128, 128, False),
        (40, 256, 256, False),
        (16, 576, 512, False),
        (40, 576, 512, False),
        (16, 576, 512, True),
        (128, 576, 512, True),
    ],
)
def test_decode(small_card, heads, dim, v_dim, latent):
    make = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, dim, generator=make).bfloat16()
    k, v = (torch.randn(8, 16, 1, d, generator=make).bfloat16() for d in (dim, v_dim))
    if latent:
        v = k[..., :v_dim]
    table, lengths = torch.randperm(8, generator=make).view(2, 4).int(), torch.tensor([50, 17], dtype=torch.int32)
    with llmcore.backend("kernel"):
        check_sample(registry["paged_attention"], Sample(f"{dim}/{v_dim}", (q, k, v, table, lengths)))
