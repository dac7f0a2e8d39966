"""linear_cross_entropy on a GPU beyond the registry: several chunks, a CUDA graph, and errors found on the device."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import check_device_errors, linear_cross_entropy, linear_cross_entropy_cuda, registry
from llmcore.ops.registry import FLOATS
from tests.ops.checks import check_sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks(dtype, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_cuda, "CHUNK_BYTES", 0)
    monkeypatch.setattr(linear_cross_entropy_cuda, "MIN_CHUNK", 13)
    with llmcore.backend("kernel"):
        for sample in registry["linear_cross_entropy"].samples(dtype, "cuda"):
            check_sample(registry["linear_cross_entropy"], sample)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_captured_call_sees_new_targets(dtype):
    make = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda", generator=make).to(dtype) for n in (300, 5000))
    targets = torch.randint(5000, (300,), device="cuda", generator=make)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def call():
        loss = linear_cross_entropy(*leaves, targets)
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    targets[::3] = -100
    graph.replay()
    for got, expected in zip(captured, call()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    check_device_errors()
    targets[17], targets[20] = 5000, -3
    graph.replay()
    assert captured[0].isnan()
    with pytest.raises(RuntimeError, match=r"2 targets lie outside the vocabulary, the first is targets\[17\] = 5000;"):
        check_device_errors()
    check_device_errors()
