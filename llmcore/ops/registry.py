"""The registry of ops: one `OpSpec` per op, from which dispatch, the support matrix, tests and benchmarks follow.

A public op in `llmcore.ops` decides by `chosen_backend(spec, ...)` between its kernel (`torch.ops.llmcore.<name>`,
registered with the torch dispatcher for CPU and CUDA) and its pure-torch reference. The decision is a table look-up;
`llmcore.explain("name", tensor)` prints it with its reason, `llmcore.ops.support()` prints the whole table.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
CPU_AND_CUDA = {"cpu": FLOATS, "cuda": FLOATS}
BACKENDS = ("auto", "kernel", "reference")


class BackendFallbackWarning(UserWarning):
    """An op took its reference implementation because no kernel serves the call."""


@dataclass(frozen=True)
class Sample:
    """One call of an op: `op(*args, **kwargs)`. `differentiable` holds the positions in args and names in kwargs whose
    gradients are checked; `poison` marks samples that hold NaN where nothing may be read, `cpu_only` those that no CUDA
    kernel takes."""

    label: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    differentiable: tuple[int | str, ...] = ()
    poison: bool = False
    cpu_only: bool = False

    def to(self, device: torch.device | str) -> Sample:
        """The call on copies of its tensors on `device`, with their strides."""

        def move(value):
            if isinstance(value, Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
            if isinstance(value, (tuple, list)):
                return type(value)(map(move, value))
            return replace(value, mask=move(value.mask)) if hasattr(value, "mask") else value  # a BlockMask

        return replace(self, args=move(self.args), kwargs={name: move(v) for name, v in self.kwargs.items()})


@dataclass(frozen=True)
class OpSpec:
    """What tests, benchmarks and the support matrix need to know of an op.

    Attributes:
        name: the public name, `llmcore.ops.<name>`; also its key in the registry.
        op: the public function.
        reference: the function of the same signature in `llmcore.reference`.
        torch_ops: names under `torch.ops.llmcore` that it calls, the forward op first. Those that end in "_backward"
            get an autograd formula that refuses second derivatives.
        dtypes: per device type, the dtypes that its kernel serves.
        reference_dtypes: the dtypes that the op accepts, those that only the reference serves included.
        features: what the op does, in a few words each, for the support matrix.
        samples: (dtype, device) -> the calls on which kernel and reference are compared: odd shapes, strided views,
            empty inputs and poison among them. Small: the whole registry is checked in a few minutes.
        benchmarks: (dtype, device) -> labelled larger calls for `bench/`, or None when the op is not worth timing.
        peer: torch's own way to the same result, called as the op is, or None. One that draws at random has a function
            `check(sample, outputs)` that gives what is wrong with its outputs, or "".
        flops: sample -> floating-point operations of the forward pass; None for memory-bound ops.
        bytes: sample -> bytes that must move in the forward pass.
        compare: output -> tuple of tensors to compare (default: all floating-point tensor outputs, and equality for
            integer ones).
    """

    name: str
    op: Callable
    reference: Callable
    torch_ops: tuple[str, ...]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=lambda: {"cpu": FLOATS})
    reference_dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.float64)
    features: tuple[str, ...] = ()
    benchmarks: Callable[[torch.dtype, str], Iterator[Sample]] | None = None
    peer: Callable | None = None
    flops: Callable[[Sample], float] | None = None
    bytes: Callable[[Sample], float] | None = None
    compare: Callable | None = None


registry: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    registry[spec.name] = spec
    for name in spec.torch_ops:
        if name.endswith("_backward"):
            refuse_gradient(name)
    return spec


def refuse_gradient(name: str) -> None:
    """Makes differentiating `llmcore::<name>` an error: torch's default is to go on without that part of the gradient,
    with a warning."""

    def backward(ctx, *_):
        raise NotImplementedError(
            f"{name} has no gradient; with llmcore.backend('reference') ops are differentiable any number of times"
        )

    torch.library.register_autograd(f"llmcore::{name}", backward)


def register_fake(name: str) -> Callable:
    """Decorates the fake kernel of `llmcore::<name>` as `torch.library.register_fake` does, with a check of devices:
    torch calls the fake kernel as soon as one tensor is on the meta device, and its uninitialised CPU results would
    pass for numbers."""

    def decorate(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*args, **kwargs):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            devices = {str(a.device) for a in leaves if isinstance(a, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: tensors are on {', '.join(sorted(devices))}; all must be on one device")
            return fake(*args, **kwargs)

        return torch.library.register_fake(f"llmcore::{name}")(checked)

    return decorate


_override = "auto"  # process-wide, so that torch.compile can guard on it


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Overrides the backend of every op in the block, process-wide.

    Args:
        name: "reference" (pure torch), "kernel" (an error where no kernel serves the call), or "auto".
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def _kernel_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a kernel serves op `name` on `device` in `dtype`, else why not."""
    spec = registry[name]
    served = spec.dtypes.get(device.type)
    if served is None:
        return f"there is no {device.type} kernel of {name}; kernels: {', '.join(spec.dtypes)}"
    if dtype not in served:
        return f"the {device.type} kernel of {name} serves {', '.join(map(_short, served))}, not {_short(dtype)}"
    return cuda_refusal(device) if device.type == "cuda" else None


def cuda_refusal(device: torch.device) -> str | None:
    """None when this build holds CUDA kernels that run on `device`, else why not and what to do."""
    from llmcore import _C

    built = _C.build_info()["cuda"]  # "sm_80 sm_90a", or why there are none
    if not built.startswith("sm_"):
        return f"this build holds no CUDA kernels: {built}. LLMCORE_CUDA=on pip install . builds them"
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    if major < 8:
        return f"{gpu} is too old for the CUDA kernels, which need sm_80"
    for architecture in built.replace("sm_", "").split():
        # an "a" architecture is for itself alone; others carry PTX, which serves all later ones
        own = architecture.endswith("a") and architecture[:-1] == f"{major}{minor}"
        if own or (architecture.isdecimal() and int(architecture) <= 10 * major + minor):
            return None
    rebuild = f"LLMCORE_CMAKE_ARGS=-DLLMCORE_CUDA_ARCHITECTURES={major}{minor} LLMCORE_CUDA=on pip install ."
    return f"the CUDA kernels of this build are for {built}, not for {gpu}; {rebuild} builds them for it"


_decisions: dict[tuple[str, str, torch.dtype], bool] = {}  # (op, device, dtype) -> is a kernel there?


def use_kernel(name: str, x: Tensor) -> bool:
    """Whether a call of op `name` whose main argument is `x` takes the kernel. float64 takes the reference by design;
    any other fall-back warns once."""
    if _override == "reference":
        return False
    if forward_ad._current_level >= 0:  # the kernels would drop the tangents without a word
        raise NotImplementedError(f"{name}: kernels have no forward-mode gradient; use llmcore.backend('reference')")
    key = (name, x.device.type, x.dtype)
    served = _decisions.get(key)
    if served is None or (not served and _override == "kernel"):
        if x.dtype not in registry[name].reference_dtypes:
            accepted = ", ".join(map(_short, registry[name].reference_dtypes))
            raise TypeError(f"{name}: the input has dtype {_short(x.dtype)}; accepted: {accepted}")
        refusal = _kernel_refusal(name, x.device, x.dtype)
        if refusal and _override == "kernel":
            raise RuntimeError(refusal)
        if refusal and x.dtype != torch.float64:
            warnings.warn(f"{refusal}; using the reference", BackendFallbackWarning, stacklevel=3)
        served = _decisions[key] = refusal is None
    return served


def has_kernel(name: str, x: Tensor | torch.nn.Module) -> bool:
    """What `use_kernel` will say of a call with x's dtype and device, for who plans ahead: without a warning, nor an
    error."""
    return _override != "reference" and _kernel_refusal(name, x.device, x.dtype) is None


def fall_back(refusal: str) -> None:
    """Warns that a call takes the reference, and why; an error where `backend("kernel")` is asked for."""
    if _override == "kernel":
        raise RuntimeError(refusal)
    warnings.warn(f"{refusal}; using the reference", BackendFallbackWarning, stacklevel=4)


def explain(name: str, x: Tensor) -> str:
    """Which backend `llmcore.ops.<name>` takes for an argument like `x`, and why not the others."""
    if name not in registry:
        raise ValueError(f"no op is called {name!r}; ops: {', '.join(sorted(registry))}")
    refusal = _kernel_refusal(name, x.device, x.dtype)
    lines = []
    if _override == "reference":
        lines.append(f"{name}: reference, because of llmcore.backend('reference')")
    elif refusal is None:
        from llmcore import _C

        where = f"instruction set {_C.active_cpu_isa()}" if x.device.type == "cpu" else "CUDA"
        lines.append(f"{name}: kernel on {x.device.type} in {_short(x.dtype)} ({where})")
    else:
        lines.append(f"{name}: reference, because {refusal}")
    return "\n".join(lines)


def support() -> dict[str, dict[str, list[str]]]:
    """op -> backend ("cpu", "cuda", "reference") -> dtypes it serves, from the table that dispatch uses."""
    table = {}
    for name, spec in sorted(registry.items()):
        row = {device: [_short(d) for d in dtypes] for device, dtypes in spec.dtypes.items()}
        row["reference"] = [_short(d) for d in spec.reference_dtypes]
        table[name] = row
    return table


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
