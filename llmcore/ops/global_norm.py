"""The L2 norm of a list of tensors, for gradient clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, refuse_gradient, register, register_fake, use_kernel


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements of `tensors` together, as clipping by the global norm needs it (Pascanu et al., "On
    the difficulty of training recurrent neural networks", arXiv 1211.5063).

    The host does not wait for it. Sums are taken in float64 but over short stretches, in an order that depends on the
    tensors' sizes only: equal inputs give equal bits.

    Args:
        tensors: one or more, of any shapes, all float32, bfloat16 or float16 (float64 through the reference) and on
            one device. One that is not contiguous is copied. Not differentiable.

    Returns:
        () float32 on their device; inf where the true norm, or the square of an element, is beyond float32; NaN where
        an element is NaN.

    Raises:
        RuntimeError: no tensor, or a dtype or device that does not fit the first one's.
    """
    if not len(tensors) or not use_kernel("global_norm", tensors[0]):
        return reference.global_norm(tensors)
    return torch.ops.llmcore.global_norm(list(tensors))


@register_fake("global_norm")
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


refuse_gradient("global_norm")


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(device, dtype)

    for shapes in (((5,), (3, 4)), ((1,),), ((), (2, 0, 3), (64, 128)), ((0,),), ((33_000,), (7,), (65_536,))):
        yield Sample(f"{list(shapes)}", ([randn(*shape) for shape in shapes],))
    yield Sample("300 tensors", ([randn(i % 23) for i in range(300)],))
    yield Sample("strided", ([randn(40, 50).t(), randn(30, 20)[::2, 3:8]],))
    large, small = randn(20_000) * 100, randn(20_000) / 100
    yield Sample("large and small", ([large, small],))
    infinite = randn(70)
    infinite[69] = -torch.inf
    yield Sample("infinite", ([randn(9), infinite],))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield Sample("64x 512x1024", (list(torch.randn(64, 512, 1024).to(device, dtype)),))


def _peer(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` takes it."""
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).norm()


register(
    OpSpec(
        name="global_norm",
        op=global_norm,
        reference=reference.global_norm,
        torch_ops=("global_norm",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("any number of tensors", "no host wait", "equal bits on every run"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: sum(t.nbytes for t in s.args[0]),
    )
)
