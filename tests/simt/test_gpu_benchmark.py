"""bench/gpu.py on small sizes: rows and their checks as on a GPU, with another clock."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import llmcore
from bench import gpu, moe_layer, optimizer
from bench.gpu_cases import MUST, benchmarks
from llmcore.ops import Sample, registry
from tests.ops.checks import check_sample
from tests.simt.emulation import emulator

BF16 = torch.bfloat16
PEERS = {"torch", "torch_gathered", "torch_compiled"}


@pytest.fixture(params=["cpu", "emulated"])
def clock(request, monkeypatch):
    """In place of L2, graphs and events; and torch.compile leaves functions as they are."""

    def launched(call, samples, capture):
        for sample in samples:
            call(sample)
        return lambda: [call(sample) for sample in samples], False

    def microseconds(run, calls):
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6 / calls

    for name, value in (("l2_bytes", lambda: 0), ("turn", launched), ("microseconds", microseconds)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with emulator() if request.param == "emulated" else nullcontext(), llmcore.backend("auto"):
        yield


def small() -> Sample:
    torch.manual_seed(0)
    return moe_layer.sample(BF16, "cpu", tokens=90, dim=64, ffn_dim=32, experts=16, top_k=3)


@pytest.mark.parametrize("direction", ["forward", "forward+backward", "backward"])
def test_the_layer_and_its_peers_agree(direction, clock):
    row = gpu.judged(gpu.measure(moe_layer.SPEC, small(), BF16, direction, rounds=1))
    assert row["left_out"] == {}
    assert set(row["ratio"]) == PEERS
    assert json.loads(json.dumps(row)) == row


def test_the_layer_by_the_rule_of_all_ops(clock):
    check_sample(moe_layer.SPEC, small())


@pytest.mark.parametrize("direction", ["forward+backward", "backward"])
def test_a_wrong_gradient_is_not_timed(direction, clock, monkeypatch):
    def wrong(function):
        # the same outputs; the router's gradient doubled
        return lambda x, router, *rest, **kw: function(x, 2 * router - router.detach(), *rest, **kw)

    peers = moe_layer.peers()
    monkeypatch.setattr(moe_layer, "peers", lambda: peers | {"torch": wrong(peers["torch"])})
    row = gpu.measure(moe_layer.SPEC, small(), BF16, direction, rounds=1)
    assert set(row["us"]) == {"llmcore", *PEERS} - {"torch"}
    reason = row["left_out"]["torch"]
    assert reason.startswith("tensor ")
    monkeypatch.setitem(MUST, (row["op"], row["case"], direction), {"torch": 1.0})
    assert f"torch left out: {reason}" in gpu.describe(gpu.judged(row), {"mm_bfloat16_tflops": 1.0})

    spec = replace(moe_layer.SPEC, op=wrong(moe_layer.layer))
    monkeypatch.setattr(moe_layer, "SPEC", spec)
    with pytest.raises(AssertionError, match=r"moe_layer, 90 tokens, top 3 of 16, 64x32: tensor \d is off by"):
        gpu.measure(spec, small(), BF16, direction, rounds=1)


def test_a_row_without_its_target_and_one_with(clock, monkeypatch):
    x, weight = torch.randn(5, 16).to(BF16), torch.randn(3, 8, 16).to(BF16)
    sample = Sample("few rows", (x, weight, torch.tensor([0, 2, 2, 5], dtype=torch.int32)), {}, (0, 1))
    row = gpu.measure(registry["grouped_gemm"], sample, BF16, "forward", rounds=1)
    moved = 2 * (5 * 16 + 2 * 8 * 16 + 5 * 8)  # the second expert has no rows
    assert row["gbytes"] * row["us"]["llmcore"] * 1e3 == pytest.approx(moved)
    limits = {"mm_bfloat16_tflops": 1e6, "copy_gbytes": 1.0}
    assert "must" not in gpu.describe(gpu.judged(row), limits)
    monkeypatch.setitem(MUST, ("grouped_gemm", "few rows", "forward"), {"gbytes": 3000, "torch": 1.5})
    line = gpu.describe(gpu.judged(row), limits)
    assert "must 3000 GB/s" in line
    assert "(must 1.5)" in line


@pytest.mark.parametrize("target", MUST, ids=", ".join)
def test_every_target_has_a_row(target):
    op, case, direction = target
    if op == "optimizer":
        count = sum(torch.Size(s).numel() for s in optimizer.SHAPES)
        assert (case, direction) == (optimizer.label(count), "step")
        return
    spec = moe_layer.SPEC if op == "moe_layer" else registry[op]
    (sample,) = (s for s in benchmarks(op, BF16, "meta") if s.label == case)
    assert direction in gpu.directions(spec, sample)
    assert set(MUST[target]) <= {*gpu.implementations(spec), *(["gbytes"] if spec.bytes else [])} - {"llmcore"}
