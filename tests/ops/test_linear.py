"""linear beyond the registry's samples: whose product is taken, gradients, rows that do not meet, errors."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops
from llmcore.ops.linear import MAX_ROWS, _rows_of_ours

MODULE = importlib.import_module("llmcore.ops.linear")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def calls_of_the_kernel(monkeypatch) -> list:
    return calls_of("_kernel", monkeypatch)


def calls_of(name, monkeypatch) -> list:
    calls = []
    function = getattr(MODULE, name)
    monkeypatch.setattr(MODULE, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.parametrize("shape", [(1,), (MAX_ROWS,), (4, MAX_ROWS // 4), (MAX_ROWS + 1,), (2, MAX_ROWS)])
def test_few_rows_take_the_kernel(shape, monkeypatch):
    calls = calls_of_the_kernel(monkeypatch)
    x, weight, bias = torch.randn(*shape, 40), torch.randn(24, 40), torch.randn(24)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == (torch.Size(shape).numel() <= MAX_ROWS)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_of_few_rows_are_torchs(wanted, monkeypatch):
    monkeypatch.setattr(MODULE, "_ROWS", {})
    calls = calls_of_the_kernel(monkeypatch)
    args = [torch.randn(3, 40), torch.randn(24, 40), torch.randn(24)]
    args[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.linear(*args).square().sum(), args[wanted])
    assert torch.equal(gradient, torch.autograd.grad(F.linear(*args).square().sum(), args[wanted])[0])
    assert not calls
    with torch.no_grad():
        ops.linear(*args)
    assert len(calls) == 1


def test_autocast_is_torchs(monkeypatch):
    monkeypatch.setattr(MODULE, "_ROWS", dict.fromkeys(FLOATS, math.inf))
    for rows in (3, 50):
        x, weight = torch.randn(rows, 40), torch.randn(24, 40)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


# ---- many rows


@pytest.mark.parametrize(
    ("isa", "traits", "float32", "bfloat16", "float16"),
    [
        ("portable", (), 0, 0, 0),
        ("avx2", ("intel",), 0, math.inf, math.inf),
        ("avx2", (), 0, math.inf, math.inf),
        ("avx512", ("intel",), 0, math.inf, math.inf),
        ("avx512vnni", ("intel",), 0, math.inf, math.inf),
        ("avx512bf16", (), math.inf, 128, math.inf),
        ("avx512bf16", ("intel", "amx_bf16", "avx512_fp16"), 0, 0, 0),
    ],
)
def test_whose_product_is_taken(isa, traits, float32, bfloat16, float16):
    rows = _rows_of_ours(isa, {name: name in traits for name in ("intel", "amx_bf16", "avx512_fp16")})
    assert [rows.get(dtype, 0) for dtype in FLOATS] == [float32, bfloat16, float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "n"), [((MAX_ROWS + 1, 40), 24), ((3, 17, 130), 70), ((2, 1, 300, 33), 259), ((600, 65), 1), ((2, 9), 5)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_our_product_and_its_gradients(dtype, shape, n, with_bias, monkeypatch):
    monkeypatch.setattr(MODULE, "_ROWS", dict.fromkeys(FLOATS, math.inf))
    calls = calls_of("grouped_gemm", monkeypatch)
    args = [torch.randn(*shape), torch.randn(n, shape[-1]), *([torch.randn(n)] if with_bias else [])]
    args = [t.to(dtype).requires_grad_() for t in args]
    exact = [t.detach().double().requires_grad_() for t in args]
    y, wanted = ops.linear(*args), F.linear(*exact)
    dy = torch.randn_like(wanted).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    grads, exact_grads = torch.autograd.grad(y, args, dy), torch.autograd.grad(wanted, exact, dy.double())
    for got, right in zip((y, *grads), (wanted, *exact_grads)):
        assert got.shape == right.shape
        assert got.dtype == dtype
        assert (got.double() - right).norm() <= tolerance * right.norm()
    assert len(calls) == 1


def test_our_product_where_one_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(MODULE, "_ROWS", dict.fromkeys(FLOATS, math.inf))
    calls = calls_of("grouped_gemm", monkeypatch)
    for wanted in range(3):
        args = [torch.randn(50, 40), torch.randn(24, 40), torch.randn(24)]
        args[wanted].requires_grad_()
        (gradient,) = torch.autograd.grad(ops.linear(*args).square().sum(), args[wanted])
        (right,) = torch.autograd.grad(F.linear(*args).square().sum(), args[wanted])
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-3)
    assert len(calls) == 3


def test_limits_of_our_product(monkeypatch):
    """With a limit, gradients and more rows than it are torch's; so is what grouped_gemm does not take."""
    monkeypatch.setattr(MODULE, "_ROWS", {torch.float32: 60})
    calls = calls_of("grouped_gemm", monkeypatch)
    weight = torch.randn(24, 40)
    for rows, ours in ((60, True), (61, False)):
        x = torch.randn(rows, 40)
        torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
        assert len(calls) == ours
        calls.clear()
    ops.linear(torch.randn(50, 40), weight.clone().requires_grad_())
    ops.linear(torch.randn(50, 40).double(), weight.double())
    assert ops.linear(torch.randn(50, 0), torch.randn(24, 0)).equal(torch.zeros(50, 24))
    assert not calls


def test_our_product_is_compiled(monkeypatch):
    monkeypatch.setattr(MODULE, "_ROWS", dict.fromkeys(FLOATS, math.inf))
    x, weight = torch.randn(2, 30, 40), torch.randn(24, 40).requires_grad_()
    compiled = torch.compile(lambda x, w: ops.linear(x, w).square().sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x, weight), weight)
    assert torch.equal(gradient, torch.autograd.grad(ops.linear(x, weight).square().sum(), weight)[0])


# ---- few rows


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
