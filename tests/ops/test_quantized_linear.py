"""quantized_linear beyond the samples: rows that do not meet, extremes, rounding, parts of a wider result, errors."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops, reference
from llmcore.reference.quantized import FORMATS


def call(name: str, rows: int, n: int, k: int, dtype: torch.dtype = torch.float32):
    make = torch.Generator().manual_seed(0)
    blocks = reference.quantize(torch.randn(n, k, generator=make), name)
    packed = reference.pack_quantized(blocks, name)
    return torch.randn(rows, k, generator=make).to(dtype), packed, name, n, torch.randn(n, generator=make).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_batch(name, dtype, isa, threads):
    """Nor on how many threads share the work."""
    x, *rest, bias = call(name, 31, 75, 768, dtype)
    threads(1)
    whole = ops.quantized_linear(x, *rest, bias)
    for n in (1, 2, 3):
        threads(n)
        assert torch.equal(ops.quantized_linear(x, *rest, bias), whole)
        for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 17), (17, 31)):
            assert torch.equal(ops.quantized_linear(x[begin:end], *rest, bias), whole[begin:end])


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q4_k"])
def test_many_rows(name, isa):
    """Several chunks of x, each with stretches of the weight."""
    x, *rest = call(name, 700, 300, 512)
    torch.testing.assert_close(
        ops.quantized_linear(x, *rest), reference.quantized_linear(x, *rest), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_quants_do_not_overflow(name, isa):
    """All q and all activations at their limits: the largest sums of products that there are."""
    f = FORMATS[name]
    fields = reference.quantized.fields_of_blocks(torch.zeros(32, 2 * f.block // f.block * f.bytes).byte(), f)
    top = (1 << f.bits) - 1
    fields.q[:16] = top
    fields.q[16:] = 0
    fields.d[:] = 1
    if f.has_min:
        fields.m[:] = 2
    if f.nested:
        fields.sc[:] = 63 if f.has_min else 127
        if not f.has_min:
            fields.sc[::2] = -128
    if fields.mn is not None:
        fields.mn[:] = 63
    packed = reference.pack_quantized(reference.quantized.blocks_of_fields(fields, f), name)
    k = fields.q.shape[1]
    signs = torch.where(torch.rand(3, k, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    x = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs]) * 127
    exact = x.double() @ fields.weights(f, torch.float64).T
    torch.testing.assert_close(ops.quantized_linear(x, packed, name, 32).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_product_is_the_same(dtype):
    """What a GPU takes for many rows."""
    dense = ops.quantized_linear.__globals__["_dense"]
    x, *rest = call("q4_k", 40, 50, 512, dtype)
    exact = ops.quantized_linear(x, *rest).float()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (dense(x, *rest).float() - exact).norm() <= limit * exact.norm()
    with pytest.raises(NotImplementedError, match="quantized_linear has no gradient"):
        dense(x.requires_grad_(), *rest).sum().backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 40, 95])
def test_what_is_not_finite_stays_in_its_row(value, at, isa):
    x, *rest = call("q4_0", 5, 40, 96)
    clean = ops.quantized_linear(x, *rest)
    x[3, at] = value
    y = ops.quantized_linear(x, *rest)
    assert y[3].isnan().all()
    assert reference.quantized_linear(x, *rest)[3].isnan().all()
    keep = [0, 1, 2, 4]
    assert torch.equal(y[keep], clean[keep])


def test_rounding_is_part_of_the_definition(isa):
    """Ties go to even, and a scale is the largest magnitude / 127: products of one weight at a time show each."""
    k = 32
    eye = reference.pack_quantized(reference.quantize(torch.eye(k), "q8_0"), "q8_0")
    x = torch.arange(-16, 16).float().repeat(2, 1) + 0.5
    x[0, 31] = 127  # scale 1
    x[1, 0] = 1000
    y = ops.quantized_linear(x, eye, "q8_0", k)
    one = reference.dequantize(reference.quantize(torch.eye(k), "q8_0"), "q8_0")[0, 0]
    assert torch.equal(y[0], x[0].round() * one)
    scale = torch.tensor(1000.0) / 127
    torch.testing.assert_close(y[1], (x[1] / scale).round() * scale * one, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 40)}, "rows have 40 weights; accepted of q8_0: multiples of 32"),
        ({"x": torch.tensor(1.0)}, r"x is a scalar; expected \(..., k\)"),
        ({"x": torch.randn(3, 96)}, r"packed has shape \(2176,\) and dtype uint8; expected \(3328,\) uint8"),
        ({"format": "q3_k"}, "quantised format 'q3_k'; accepted: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k"),
        ({"packed": torch.zeros(2176, dtype=torch.int8)}, "dtype int8; expected"),
        ({"packed": torch.zeros(2, 1088, dtype=torch.uint8)}, r"packed has shape \(2, 1088\)"),
        ({"out_features": -1}, "out_features is -1; accepted: 0 or more"),
        (
            {"out_features": 33},
            r"packed has shape \(2176,\) and dtype uint8; expected \(3264,\) uint8, q8_0 of \(33, 64\)",
        ),
        ({"bias": torch.zeros(21)}, r"bias has shape \(21,\); expected \(20\)"),
        ({"bias": torch.zeros(20).half()}, "bias has dtype float16, but x has float32"),
    ],
)
def test_the_binding_refuses(change, message):
    x, packed, format, n, bias = call("q8_0", 3, 20, 64)
    args = {"x": x, "packed": packed, "format": format, "out_features": n, "bias": bias} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.quantized_linear(*args.values())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(4, 20), r"y has shape \(4, 20\), but x has shape \(3, 64\); all but their last dimensions"),
        (torch.zeros(20), r"y has shape \(20,\), but x has shape \(3, 64\)"),
        (
            torch.zeros(3, 40),
            r"packed has shape \(2176,\) and dtype uint8; expected \(3264,\) uint8, q8_0 of \(40, 64\)",
        ),
        (torch.zeros(3, 20).double(), "y has dtype float64, but x has float32"),
        (torch.zeros(20, 3).t(), "y has stride 3 in its last dimension; it is written in place"),
        (torch.zeros(1, 20).expand(3, 20), "y has overlapping elements"),
    ],
)
def test_a_result_that_does_not_fit(y, message):
    x, packed, format, _, _ = call("q8_0", 3, 20, 64)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.quantized_linear_(y, x, packed, format, None)


def test_a_result_whose_rows_have_no_distance():
    x, packed, format, _, _ = call("q8_0", 6, 20, 64)
    y = torch.zeros(2, 4, 20)[:, :3]
    with pytest.raises(RuntimeError, match="the rows of y do not lie at one distance"):
        ops.quantized_linear_(y, x.view(2, 3, 64), packed, format)
    with pytest.raises(TypeError, match=r"y has dtype torch.float64, but x has torch.float32"):
        ops.quantized_linear_(y[0].double(), x[:3], packed, format)
    with pytest.raises(NotImplementedError, match="quantized_linear_ has no gradient"):
        ops.quantized_linear_(y[0], x[:3].requires_grad_(), packed, format)


def test_the_other_bindings_refuse():
    with pytest.raises(
        RuntimeError, match=r"blocks have shape \(2, 35\) and dtype uint8; expected \(n, bytes\) uint8, 34"
    ):
        ops.pack_quantized(torch.zeros(2, 35, dtype=torch.uint8), "q8_0")
    with pytest.raises(RuntimeError, match="pack_quantized: quantised format 'f16'"):
        ops.pack_quantized(torch.zeros(2, 34, dtype=torch.uint8), "f16")
    _, packed, *_ = call("q8_0", 3, 20, 64)
    for ids in ([3, 20], [-1]):
        with pytest.raises(RuntimeError, match=r"id (20|-1); accepted: 0 to num_embeddings - 1 = 19"):
            ops.quantized_embedding(torch.tensor(ids), packed, "q8_0", 20, 64)
        with pytest.raises(IndexError, match=r"accepted: 0 to 19"):
            reference.quantized_embedding(torch.tensor(ids), packed, "q8_0", 20, 64)
    with pytest.raises(RuntimeError, match="the result has dtype int32"):
        ops.quantized_embedding(torch.tensor([0]), packed, "q8_0", 20, 64, torch.int32)
