"""linear beyond the registry's samples: when the kernel is taken, gradients, rows that do not meet, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops
from llmcore.ops.linear import MAX_ROWS


def calls_of_the_kernel(monkeypatch) -> list:
    calls = []
    kernel = ops.linear.__globals__["_kernel"]
    monkeypatch.setitem(ops.linear.__globals__, "_kernel", lambda *args: calls.append(args) or kernel(*args))
    return calls


@pytest.mark.parametrize("shape", [(1,), (MAX_ROWS,), (4, MAX_ROWS // 4), (MAX_ROWS + 1,), (2, MAX_ROWS)])
def test_few_rows_take_the_kernel(shape, monkeypatch):
    calls = calls_of_the_kernel(monkeypatch)
    x, weight, bias = torch.randn(*shape, 40), torch.randn(24, 40), torch.randn(24)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == (torch.Size(shape).numel() <= MAX_ROWS)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_are_torchs(wanted, monkeypatch):
    calls = calls_of_the_kernel(monkeypatch)
    args = [torch.randn(3, 40), torch.randn(24, 40), torch.randn(24)]
    args[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.linear(*args).square().sum(), args[wanted])
    assert torch.equal(gradient, torch.autograd.grad(F.linear(*args).square().sum(), args[wanted])[0])
    assert not calls
    with torch.no_grad():
        ops.linear(*args)
    assert len(calls) == 1


def test_autocast_is_torchs():
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_batch(dtype):
    """Nor on how many threads share the weight's rows."""
    x, weight, bias = (
        torch.randn(MAX_ROWS, 1111).to(dtype),
        torch.randn(203, 1111).to(dtype),
        torch.randn(203).to(dtype),
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = ops.linear(x, weight, bias)
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 32)):
        assert torch.equal(ops.linear(x[begin:end], weight, bias), whole[begin:end])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (5, 6)), r"x has shape \(3, 4\), but weight has shape \(5, 6\); their last dimensions must be equal"),
        (((3, 4), (4,)), r"weight has shape \(4,\); expected \(n, k\)"),
        (((3, 4), (5, 4), (4,)), r"bias has shape \(4,\); expected \(5\)"),
        (((MAX_ROWS + 1, 4), (5, 4)), "the kernel accepts at most 32"),
    ],
)
def test_the_binding_refuses(shapes, message):
    x, weight, *bias = (torch.randn(*shape) for shape in shapes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.linear(x, weight, *bias or [None])
    with pytest.raises(RuntimeError, match="weight has dtype float64, but x has float32"):
        torch.ops.llmcore.linear(torch.randn(2, 3), torch.randn(4, 3).double(), None)
