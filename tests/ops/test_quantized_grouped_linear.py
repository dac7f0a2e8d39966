"""quantized_grouped_linear beyond the samples: quantized_linear's bits, shares of the work, packing, errors."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore import ops, reference
from llmcore.ops.grouped_gemm import offsets_of
from llmcore.reference.quantized import FORMATS

OP = ops.quantized_grouped_linear


def call(name: str, rows: list[int], n: int, k: int, dtype: torch.dtype = torch.float32):
    """(x, packed, format, n, offsets) and the experts' biases."""
    make = torch.Generator().manual_seed(0)
    blocks = reference.quantize(torch.randn(len(rows) * n, k, generator=make), name).unflatten(0, (len(rows), n))
    packed, x = ops.pack_experts(blocks, name), torch.randn(sum(rows), k, generator=make).to(dtype)
    return (x, packed, name, n, offsets_of(rows, "cpu")), torch.randn(len(rows), n, generator=make).to(dtype)


def one_by_one(x, packed, name, n, offsets, bias):
    rows = x.split(offsets.diff().tolist())
    return torch.cat([ops.quantized_linear(r, w, name, n, b) for r, w, b in zip(rows, packed, bias)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_the_bits_of_their_experts_product(name, dtype, isa, threads):
    """On any number of threads, with rows of one expert, of few and of many."""
    for rows in ([1, 0, 0], [0, 1, 1, 1, 0, 1], [3, 17, 0, 31], [0, 40]):
        args, bias = call(name, rows, 75, 512, dtype)
        threads(1)
        exact = one_by_one(*args, bias)
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(OP(*args, bias=bias), exact)


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q4_k"])
def test_an_expert_with_several_chunks_of_rows(name, isa, threads):
    threads(2)
    args, bias = call(name, [5, 1400, 0, 3], 40, 512)
    assert torch.equal(OP(*args, bias=bias), one_by_one(*args, bias))


def test_gathered_rows_are_those_of_a_copy(isa):
    (x, *rest, offsets), bias = call("q6_k", [9, 0, 4, 7], 50, 256)
    token_of = torch.randint(0, 6, (20,), dtype=torch.int32)
    copied = OP(x[:6][token_of.long()], *rest, offsets, bias=bias)
    assert torch.equal(OP(x[:6], *rest, offsets, token_of=token_of, bias=bias), copied)


def test_what_is_not_finite_stays_in_its_row(isa):
    args, bias = call("q4_0", [2, 3, 1], 40, 96)
    clean = OP(*args, bias=bias)
    args[0][3, 40] = torch.nan
    y = OP(*args, bias=bias)
    assert y[3].isnan().all()
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_product_is_the_same(dtype):
    """What a GPU takes for many rows."""
    dense = OP.__globals__["_dense"]
    for n in (48, 50):
        (x, *rest), bias = call("q4_k", [9, 0, 31, 2], n, 512, dtype)
        token_of = torch.arange(41, -1, -1, dtype=torch.int32)
        exact = OP(x, *rest, token_of=token_of, bias=bias).float()
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (dense(x, *rest, token_of, bias).float() - exact).norm() <= limit * exact.norm()
    plain = dense(x, *rest, None, None)
    assert (plain.float() - OP(x, *rest).float()).norm() <= limit * plain.float().norm()


@pytest.mark.parametrize("n", [32, 37])
@pytest.mark.parametrize("name", FORMATS)
def test_each_expert_is_packed_for_itself(name, n, isa):
    f = FORMATS[name]
    blocks = torch.randint(0, 256, (3, n, 2 * f.bytes), dtype=torch.uint8)
    packed = ops.pack_experts(blocks, name)
    assert packed.shape == (3, f.packed_bytes(n, 2 * f.block))
    for expert, one in zip(packed, blocks):
        assert torch.equal(expert, ops.pack_quantized(one, name))


ARGS, BIAS = call("q8_0", [2, 0, 3], 20, 64)
X, PACKED, FORMAT, N, OFFSETS = ARGS
TOKEN_OF = torch.tensor([0, 4, 1, 0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(5, 40)}, "rows have 40 weights; accepted of q8_0: multiples of 32"),
        (
            {"x": torch.randn(5, 96)},
            r"packed has shape \(3, 2176\) and dtype uint8; expected \(3, 3328\) uint8, q8_0 of",
        ),
        ({"x": torch.randn(1, 5, 64)}, r"x has shape \(1, 5, 64\); expected \(rows, k\)"),
        ({"x": torch.randn(5, 64).double()}, "x has dtype float64"),
        ({"format": "q3_k"}, "quantised format 'q3_k'; accepted: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k"),
        ({"packed": PACKED.view(torch.int8)}, "dtype int8; expected"),
        ({"packed": PACKED.flatten()}, r"packed has shape \(6528,\)"),
        ({"packed": PACKED[:2]}, r"packed has shape \(2, 2176\) and dtype uint8; expected \(3, 2176\)"),
        ({"out_features": -1}, "sizes from 0 on"),
        ({"out_features": 33}, r"expected \(3, 3264\) uint8, q8_0 of \(33, 64\)"),
        ({"offsets": torch.tensor([0]).int()}, r"offsets has shape \(1,\); there must be an expert"),
        ({"offsets": OFFSETS[None]}, r"offsets has shape \(1, 4\); expected \(num_experts \+ 1,\)"),
        ({"offsets": OFFSETS.long()}, "offsets has dtype int64; expected int32"),
        ({"offsets": torch.tensor([0, 3, 2, 5]).int()}, r"offsets\[2\] is 2, below 3 before it"),
        ({"offsets": torch.tensor([1, 3, 3, 5]).int()}, r"offsets\[0\] is 1; offsets start with 0"),
        ({"offsets": torch.tensor([0, 3, 3, 4]).int()}, "offsets ends with 4, but x has 5 rows"),
        ({"token_of": TOKEN_OF[:4]}, "offsets ends with 5, but token_of has 4 rows"),
        ({"token_of": TOKEN_OF.long()}, "token_of has dtype int64; expected int32"),
        ({"token_of": TOKEN_OF[None]}, r"token_of has shape \(1, 5\); expected \(rows,\)"),
        ({"token_of": TOKEN_OF + 1}, r"token_of\[1\] is 5; accepted: 0 to tokens - 1 = 4"),
        ({"token_of": TOKEN_OF - 1}, r"token_of\[0\] is -1; accepted: 0 to tokens - 1 = 4"),
        ({"bias": BIAS[:2]}, r"bias has shape \(2, 20\); expected \(3, 20\)"),
        ({"bias": BIAS.half()}, "bias has dtype float16, but x has float32"),
    ],
)
def test_the_binding_refuses(change, message):
    args = {"x": X, "packed": PACKED, "format": FORMAT, "out_features": N, "offsets": OFFSETS}
    args |= {"token_of": None, "bias": None} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.quantized_grouped_linear(*args.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3, 2, 5]).int()}, "offsets that start with 0, do not fall and end with 5"),
        ({"offsets": OFFSETS[:3]}, r"offsets has shape \(3,\); expected \(4,\)"),
        ({"token_of": TOKEN_OF + 1}, "token_of holds 5; accepted: 0 to 4"),
        ({"bias": BIAS[:2]}, r"bias has shape \(2, 20\)"),
    ],
)
def test_the_reference_refuses(change, message):
    args = {"x": X, "packed": PACKED, "format": FORMAT, "out_features": N, "offsets": OFFSETS} | change
    with llmcore.backend("reference"), pytest.raises(RuntimeError, match=message):
        OP(**args)


def test_no_gradient():
    for backend in ("kernel", "reference"):
        with llmcore.backend(backend), pytest.raises((NotImplementedError, RuntimeError), match="has no gradient"):
            OP(X.clone().requires_grad_(), *ARGS[1:]).sum().backward()
