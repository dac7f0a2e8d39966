"""What is timed: every benchmark sample of the registry, forward and forward + backward, as llmcore's kernel, torch's
own operator and the pure-torch reference do it on the same inputs. Results are checked before anything is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcore.ops import OpSpec, Sample, registry

# Relative error (Frobenius norm) up to which an implementation counts as computing what the reference computes.
AGREE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# torch's own operator may be coarser: its layer_norm sums bf16 weight gradients over the rows in bf16.
PEER_AGREE = {**AGREE, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Case:
    spec: OpSpec
    sample: Sample
    dtype: torch.dtype
    direction: str  # "forward" or "forward+backward"

    @property
    def name(self) -> str:
        return f"{self.spec.name} | {self.sample.label} | {str(self.dtype).removeprefix('torch.')} | {self.direction}"

    def implementations(self) -> dict[str, Callable]:
        found = {"llmcore": self.spec.op, "torch": self.spec.peer, "reference": self.spec.reference}
        return {name: function for name, function in found.items() if function is not None}

    @staticmethod
    def timed(function: Callable) -> Callable:
        """What to time: of an op that writes in place, which is checked on copies, the op itself."""
        return getattr(function, "in_place", function)

    def call(self, function: Callable) -> list[Tensor]:
        """One run: outputs, and gradients when the direction asks for them."""
        if self.direction == "forward":
            with torch.no_grad():
                return _tensors(function(*self.sample.args, **self.sample.kwargs))
        args, kwargs = list(self.sample.args), dict(self.sample.kwargs)
        leaves = []
        for where in self.sample.differentiable:
            holder = args if isinstance(where, int) else kwargs
            holder[where] = holder[where].detach().requires_grad_()
            leaves.append(holder[where])
        outputs = [t for t in _tensors(function(*args, **kwargs)) if t.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [_seed(o.shape, o.dtype) for o in outputs], allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]

    def check(self) -> None:
        """Every implementation computes what the reference computes, or this case must not be timed."""
        expected = self.call(self.spec.reference)
        for name, function in self.implementations().items():
            outputs = self.call(function)
            if hasattr(function, "check"):
                assert not (wrong := function.check(self.sample, outputs)), f"{self.name}: {name}: {wrong}"
                continue
            for i, (got, want) in enumerate(zip(outputs, expected)):
                if not want.is_floating_point():
                    assert torch.equal(got, want), f"{self.name}: {name}'s tensor {i} is another"
                    continue
                agree = (PEER_AGREE if name == "torch" else AGREE)[self.dtype]
                error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
                assert error <= agree, f"{self.name}: {name}'s tensor {i} is off by {error:.1e}"

    def work(self) -> tuple[str, float]:
        """("flop" or "byte", how many in one call); a backward pass counts 2.5 forward passes for attention, else 2."""
        if self.spec.flops:
            backward = 2.5 if self.spec.name == "attention" else 2.0
            return "flop", self.spec.flops(self.sample) * (1 + backward * (self.direction != "forward"))
        if self.spec.bytes and self.direction == "forward":
            return "byte", self.spec.bytes(self.sample)
        return "", 0.0


@functools.lru_cache(maxsize=4)
def _seed(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient that reaches an output. Random: the gradient of equal ones vanishes behind a LayerNorm."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for item in output or () for t in _tensors(item)] if isinstance(output, (tuple, list)) else []


def cases(dtypes=(torch.float32, torch.bfloat16, torch.int32), only: str = "") -> Iterator[Case]:
    for name, spec in sorted(registry.items()):
        if only not in name or spec.benchmarks is None:
            continue
        for dtype in dtypes:
            if dtype not in spec.dtypes["cpu"]:
                continue
            for sample in spec.benchmarks(dtype, "cpu"):
                yield Case(spec, sample, dtype, "forward")
                if sample.differentiable:
                    yield Case(spec, sample, dtype, "forward+backward")
