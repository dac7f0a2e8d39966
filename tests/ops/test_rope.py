"""What the registry's checks do not say of rope: its geometry, the in-place variant in autograd, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import llmcore
from llmcore.ops import rope, rope_, rope_tables

PAIRINGS = pytest.mark.parametrize("interleaved", [False, True])


def test_tables_are_exact_at_large_positions():
    cos, sin = rope_tables(131072, 64, base=500000.0)
    assert cos.shape == sin.shape == (131072, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for position, i in ((131071, 0), (131071, 1), (99999, 7), (131071, 31)):
        angle = position * 500000.0 ** (-2 * i / 64)
        assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


@PAIRINGS
def test_scores_depend_on_distance_alone(interleaved):
    """The point of the embedding: <rope(q, m), rope(k, n)> is a function of m - n."""
    q, k = torch.randn(2, 1, 1, 64)
    tables = rope_tables(1100, 64)

    def score(m, n):
        at = [torch.tensor([position]) for position in (m, n)]
        rotated = [rope(x, *tables, p, interleaved=interleaved) for x, p in zip((q, k), at)]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=2e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_pairings_agree_up_to_the_order_of_elements():
    x = torch.randn(2, 5, 3, 32)
    tables = rope_tables(5, 32)
    halves_first = x.unflatten(-1, (2, 16)).transpose(-1, -2).flatten(-2)  # (i, i + 16) side by side
    expected = rope(x, *tables).unflatten(-1, (2, 16)).transpose(-1, -2).flatten(-2)
    assert torch.equal(rope(halves_first, *tables, interleaved=True), expected)


@PAIRINGS
def test_gradient_is_the_inverse_rotation(interleaved):
    x = torch.randn(2, 5, 3, 40, requires_grad=True)
    tables = rope_tables(5, 32)
    y = rope(x, *tables, interleaved=interleaved)
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert torch.allclose(back, x, atol=1e-6)


@PAIRINGS
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_in_place_in_autograd(interleaved, backend):
    """On a slice of a fused projection, in the middle of a graph: the gradient of the functional op, bit for bit."""
    tables = rope_tables(50, 24)
    positions = torch.randint(50, (2, 5))
    projection, weight = torch.randn(2, 5, 6, 40), torch.randn(40, requires_grad=True)
    seed = torch.randn(2, 5, 2, 32)
    with llmcore.backend(backend):
        expected = rope((projection * weight)[:, :, 1:3, 4:36], *tables, positions, interleaved=interleaved)
        (expected_gradient,) = torch.autograd.grad(expected, weight, seed)
        fused = projection * weight
        before = fused.detach().clone()
        y = rope_(fused[:, :, 1:3, 4:36], *tables, positions, interleaved=interleaved)
        (gradient,) = torch.autograd.grad(y, weight, seed)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(fused[:, :, 1:3, 4:36], expected)
    fused = fused.detach().clone()
    fused[:, :, 1:3, 4:36] = before[:, :, 1:3, 4:36]
    assert torch.equal(fused, before), "elements beside the slice changed"


def test_in_place_is_seen_by_autograd():
    x, weight = torch.randn(3, 2, 8), torch.ones(8, requires_grad=True)
    product = x * weight  # saves x
    rope_(x, *rope_tables(3, 8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        rope_(torch.randn(3, 2, 8, requires_grad=True), *rope_tables(3, 8))
    with torch.inference_mode():
        x = torch.randn(3, 2, 8)
        assert torch.equal(rope_(x.clone(), *rope_tables(3, 8)), rope(x, *rope_tables(3, 8)))


def test_in_place_compiles_with_gradients():
    tables = rope_tables(5, 8)

    def step(x):
        return rope_(x * 2, *tables).square().sum()

    x = torch.randn(2, 5, 3, 8)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_offsets_past_2_31():
    """A view into a wide parent whose last token lies past element 2^31 (the parent's pages are never touched)."""
    try:
        parent = torch.empty(3, 1_100_000_000, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 6.6 GB")
    x = torch.randn(3, 2, 16).bfloat16()
    view = parent[:, -32:].unflatten(1, (2, 16))
    view.copy_(x)
    tables = rope_tables(3, 16)
    assert torch.equal(rope(view, *tables), rope(x, *tables))
    assert torch.equal(rope_(view, *tables), rope(x, *tables))


X = torch.randn(2, 3, 2, 8)
COS, SIN = rope_tables(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([[0, 1, 2], [1, 2, 4]])}, r"position 4 \(token 5\) is outside .* of length 4"),
        ({"positions": torch.tensor([[0, -1, 2], [1, 2, 3]])}, r"position -1 \(token 1\) is outside .* of length 4"),
        ({"positions": torch.zeros(2, 3)}, "positions has dtype float32; accepted: int32, int64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions has shape \(3,\); expected \(2, 3\)"),
        ({"x": torch.randn(1, 5, 1, 8)}, r"position 4 \(the last of 5 tokens\) is outside .* of length 4"),
        ({"x": torch.randn(2, 8)}, r"x has shape \(2, 8\); expected \(batch, seq, heads, head_dim\)"),
        ({"x": torch.randn(2, 3, 2, 6)}, "rotate 8 elements .* but x's head_dim is 6"),
        ({"x": X.to(torch.int32)}, "x has dtype int32; accepted: float32, bfloat16, float16"),
        ({"cos": COS.double()}, "cos has dtype float64; expected float32"),
        ({"sin": SIN[:, :3]}, r"cos has shape \(4, 4\), but sin has \(4, 3\)"),
        ({"cos": COS[0]}, r"cos has shape \(4,\); expected \(max_positions, rotary_dim / 2\)"),
    ],
)
def test_bad_input(change, message):
    call = {"x": X, "cos": COS, "sin": SIN, "positions": None, "interleaved": False, "inverse": False, **change}
    before = call["x"].clone()
    for op in (torch.ops.llmcore.rope, torch.ops.llmcore.rope_):
        with pytest.raises(RuntimeError, match=message):
            op(**call)
    assert torch.equal(call["x"], before), "written before the error"


def test_in_place_refuses_memory_it_cannot_write():
    with pytest.raises(RuntimeError, match="stride 2 in its last dimension; it is written in place"):
        rope_(torch.randn(3, 2, 16)[..., ::2], *rope_tables(3, 8))
    with pytest.raises(RuntimeError, match=r"overlapping elements \(a dimension of size 2 has stride 0\)"):
        rope_(torch.randn(3, 1, 8).expand(3, 2, 8), *rope_tables(3, 8))


@pytest.mark.parametrize("position", [4, -1])
def test_reference_names_the_position(position):
    with llmcore.backend("reference"), pytest.raises(RuntimeError, match=rf"position {position} \(token 2\)"):
        rope(X[0], COS, SIN, torch.tensor([0, 1, position]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 7), "rotary_dim is 7"), ((-1, 8), "max_positions is -1"), ((4, 8, 0.0), "base is 0.0")],
)
def test_tables_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_tables(*arguments)
