"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel
from llmcore.ops.rope_scaling import RopeScaling


def rope_tables(
    max_positions: int,
    rotary_dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    *,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * base^(-2i / rotary_dim), for `rope`.

    Args:
        max_positions: positions 0 to max_positions - 1 are in the tables.
        rotary_dim: elements of a head that are rotated; even.
        base: of the geometric series of frequencies.
        device: where the tables go.
        scaling: stretches the frequencies for texts longer than those of the training.

    Returns:
        two (max_positions, rotary_dim / 2) float32 tensors, computed in float64: a float32 angle of position 100000 is
        already wrong in the third digit.
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and not negative")
    if max_positions < 0:
        raise ValueError(f"max_positions is {max_positions}; it must not be negative")
    if not base > 0:
        raise ValueError(f"base is {base}; it must be positive")
    frequencies = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))
    amplitude = 1.0
    if scaling is not None:
        frequencies, amplitude = scaling.apply(frequencies, base)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)
    return (angles.cos() * amplitude).to(device, torch.float32), (angles.sin() * amplitude).to(device, torch.float32)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of elements of each head by the angles of the token's position.

    With rotary_dim = 2 * cos.shape[1], elements rotary_dim and up are copied (partial rotary embedding). Computed in
    float32 and rounded once. The backward pass is the rotation by the negative angles; cos and sin get no gradient.

    Args:
        x: (batch, seq, heads, head_dim), or packed (total, heads, head_dim); float32, bfloat16 or float16 (float64
            through the reference). Strides are free, such as a slice of a fused QKV projection; a last dimension that
            is not contiguous is copied.
        cos, sin: (max_positions, rotary_dim / 2) float32 tables as of `rope_tables`; rotary_dim <= head_dim.
        positions: (batch, seq) for a 4-dimensional x, (total,) for a packed one; int32 or int64. None: 0 to seq - 1
            (0 to total - 1).
        interleaved: pair i is (2i, 2i + 1), as in the RoFormer paper and GPT-J; else (i, i + rotary_dim / 2), as in
            GPT-NeoX and the Hugging Face form of Llama.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        RuntimeError: a position outside the table, by value and token; a shape, dtype or device that does not fit.
    """
    if not use_kernel("rope", x):
        return reference.rope(x, cos, sin, positions, interleaved=interleaved)
    return torch.ops.llmcore.rope(x, cos, sin, positions, interleaved, False)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """`rope` in place: overwrites x and returns it. x's last dimension must be contiguous and no two of its elements
    may share memory. Nothing is written when an error is raised. Differentiable as any in-place op is: not on a leaf
    that requires grad."""
    if not use_kernel("rope_", x):
        return reference.rope_(x, cos, sin, positions, interleaved=interleaved)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RopeInPlace.apply(x, cos, sin, positions, interleaved)
    torch.ops.llmcore.rope_(x, cos, sin, positions, interleaved, False)
    if not torch.compiler.is_compiling() and not x.is_inference():
        torch.autograd.graph.increment_version(x)  # who saved x for a backward pass must learn that it changed
    return x


class _RopeInPlace(torch.autograd.Function):  # register_autograd does not take ops that mutate
    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved):
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin, positions)
        torch.ops.llmcore.rope_(x, cos, sin, positions, interleaved, False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        cos, sin, positions = ctx.saved_tensors
        return torch.ops.llmcore.rope(dy, cos, sin, positions, ctx.interleaved, True), None, None, None, None


@register_fake("rope")
def _(x, cos, sin, positions, interleaved, inverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("rope_")
def _(x, cos, sin, positions, interleaved, inverse):
    return None


def _save(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dy):
    dx = torch.ops.llmcore.rope(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None


torch.library.register_autograd("llmcore::rope", _backward, setup_context=_save)


def _calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, dict]]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def randint(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=make, dtype=dtype).to(device)

    for pairing, interleaved in (("halves", False), ("pairs", True)):
        kwargs = {"interleaved": interleaved}
        for shape in ((2, 3, 2, 8), (1, 1, 1, 2), (2, 5, 3, 64), (1, 3, 2, 62), (2, 4, 1, 118)):
            yield f"{pairing}: {shape}", (randn(*shape), *rope_tables(7, shape[-1], device=device)), kwargs
        tables = rope_tables(5000, 32, device=device)
        positions = randint(5000, 2, 6)
        yield f"{pairing}: positions", (randn(2, 6, 3, 32), *tables, positions), kwargs
        strided = randint(5000, 6, 2, dtype=torch.int32).t()
        yield f"{pairing}: int32 positions, strided", (randn(2, 6, 3, 32), *tables, strided), kwargs
        yield f"{pairing}: packed", (randn(9, 3, 32), *tables, randint(5000, 9)), kwargs
        yield f"{pairing}: packed without positions", (randn(9, 3, 32), *tables), kwargs
        yield f"{pairing}: partial, odd head size", (randn(2, 6, 3, 59), *tables), kwargs
        yield f"{pairing}: nothing rotated", (randn(1, 2, 3, 5), *rope_tables(4, 0, device=device)), kwargs
        qkv = randn(2, 6, 5, 3 * 40)
        yield f"{pairing}: slice of a fused projection", (qkv[:, :, 1:4, 40:72], *tables, positions), kwargs
        yield f"{pairing}: heads first", (randn(2, 3, 6, 32).transpose(1, 2), *tables), kwargs
        yield f"{pairing}: no tokens", (randn(2, 0, 3, 32), *tables), kwargs
        yield f"{pairing}: packed, no tokens", (randn(0, 3, 32), *tables, randint(5000, 0)), kwargs


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for label, args, kwargs in _calls(dtype, device):
        yield Sample(label, args, kwargs, differentiable=(0,))
    scattered = torch.randn(2, 3, 32, 4, generator=torch.Generator().manual_seed(1)).to(device, dtype).transpose(2, 3)
    yield Sample("last dimension strided", (scattered, *rope_tables(9, 32, device=device)), differentiable=(0,))
    cos, sin = rope_tables(9, 64, device=device)
    poisoned = [table.index_fill(0, torch.tensor([0, 4, 8], device=device), torch.nan) for table in (cos, sin)]
    positions = torch.tensor([1, 7, 3], device=device)
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    yield Sample("unused rows of the tables are NaN", (x, *poisoned, positions), differentiable=(0,), poison=True)


def _in_place_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for label, args, kwargs in _calls(dtype, device):
        yield Sample(label, args, kwargs)


def _on_copy(function):
    """The in-place op on a copy of x with x's own strides (a sample is used more than once)."""

    def run(x: Tensor, *args, **kwargs) -> Tensor:
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return function(copy.copy_(x), *args, **kwargs)

    return run


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    qkv = torch.randn(4, 1024, 48, 128).to(device, dtype)
    yield Sample("4x1024x32x128", (qkv[:, :, :32], *rope_tables(1024, 128, device=device)), differentiable=(0,))


def _peer(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """What models write in torch: the halves swapped by a concatenation, in x's dtype (no partial rotary)."""
    if positions is None:
        positions = torch.arange(x.shape[-3], device=x.device)
    c, s = (t[positions.long()].unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    if interleaved:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(c.float(), s.float())).flatten(-2).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * torch.cat((c, c), -1) + torch.cat((-second, first), -1) * torch.cat((s, s), -1)


def _bytes(sample: Sample) -> float:
    return 2 * sample.args[0].numel() * sample.args[0].element_size()


_FEATURES = ("half-split and interleaved pairs", "partial rotary", "positions per token", "packed", "strides free")
register(
    OpSpec(
        name="rope",
        op=rope,
        reference=reference.rope,
        torch_ops=("rope",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=(*_FEATURES, "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=_bytes,
    )
)
register(
    OpSpec(
        name="rope_",
        op=_on_copy(rope_),
        reference=_on_copy(reference.rope_),
        torch_ops=("rope_",),
        samples=_in_place_samples,
        dtypes=CPU_AND_CUDA,
        features=(*_FEATURES, "in place", "backward"),
        bytes=_bytes,
    )
)
