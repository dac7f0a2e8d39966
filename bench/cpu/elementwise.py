"""Element-wise kernels and reductions, each one pass over memory; qk_norm_rope against the ops it takes the place of;
the optimizer's step.

"cached": 2048 x 512, a small model's activations, which stay in the last-level cache. "streamed": 16 MiB for each
tensor, as far as glibc keeps freed memory (32 MiB). Beyond that every fresh output is mapped anew, and all
implementations alike wait for the kernel's page faults (docs/cpu-elementwise.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu import Row, assert_close, name_of
from llmcore import ops
from llmcore.ops.moe_permute import sort_by_torch

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}  # relative error; a bf16 peer rounds after every operation
EAGER, COMPILED = 1.5, 1.0
SIZES = {
    "cached": {torch.float32: (2048, 512), torch.bfloat16: (2048, 512)},
    "streamed": {torch.float32: (2048, 2048), torch.bfloat16: (4096, 2048)},
}


@dataclass(frozen=True)
class Case:
    """leaves: the differentiable inputs. reads, writes: tensors as large as x that the forward pass moves; those of
    forward and backward together."""

    kernel: str
    own: Callable[..., Tensor | tuple[Tensor, ...]]
    peer: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    forward_moves: float
    both_moves: float


def _peer_rope(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """What models write in torch; c, s: (seq, 1, head_dim)."""
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


def _cases(rows: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(dtype).requires_grad_()

    weight, bias, alpha = randn(dim), randn(dim), torch.full((1,), 0.5, dtype=dtype).requires_grad_()
    yield Case("rms_norm", ops.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (randn(rows, dim), weight), 2, 5)

    def add_norm(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        z = x + residual
        return F.rms_norm(z, w.shape, w, 1e-6), z

    yield Case(
        "rms_norm with residual", lambda x, w, r: ops.rms_norm(x, w, 1e-6, r), add_norm,
        (randn(rows, dim), weight, randn(rows, dim)), 4, 8,
    )  # fmt: skip
    cos, sin = ops.rope_tables(512, 64)
    c, s = (torch.cat((t, t), -1).unsqueeze(1).to(dtype) for t in (cos, sin))
    yield Case(
        "rope", lambda x: ops.rope(x, cos, sin), lambda x: _peer_rope(x, c, s),
        (randn(rows // 512, 512, dim // 64, 64),), 2, 4,
    )  # fmt: skip
    gate_up = randn(rows, 2 * dim)
    yield Case(
        "swiglu", lambda t: ops.swiglu(*t.chunk(2, -1)), lambda t: F.silu(t[:, :dim]) * t[:, dim:], (gate_up,), 3, 8
    )
    yield Case(
        "dyt", ops.dyt, lambda x, a, w, b: torch.tanh(a * x) * w + b, (randn(rows, dim), alpha, weight, bias), 2, 5
    )


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _forward(function: Callable, case: Case) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _tensors(function(*case.leaves))


def _both(function: Callable, case: Case, seeds: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_tensors(function(*case.leaves)), case.leaves, seeds)


def _row(case: Case, size: str, dtype: torch.dtype, direction: str) -> Row:
    make = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=make).to(dtype) for o in _forward(case.own, case)]

    def calls_of(case: Case, seeds: list[Tensor], functions: dict[str, Callable]) -> dict[str, Callable]:
        if direction == "forward":
            return {name: lambda f=f: _forward(f, case) for name, f in functions.items()}
        return {name: lambda f=f: _both(f, case, seeds) for name, f in functions.items()}

    functions = {"llmcore": case.own, "torch eager": case.peer}
    must = {"torch eager": EAGER}
    if size == "cached" and direction == "forward+backward":  # compiling takes seconds a case
        torch._dynamo.reset()
        functions["torch.compile"], must["torch.compile"] = torch.compile(case.peer, dynamic=False), COMPILED
    calls = calls_of(case, seeds, functions)

    def check() -> None:
        exact = Case(case.kernel, case.own, case.peer, tuple(t.detach().double().requires_grad_() for t in case.leaves),
                     0, 0)  # fmt: skip
        wanted = calls_of(exact, [s.double() for s in seeds], {"exact": case.own})["exact"]()
        for name, call in calls.items():
            for i, (got, want) in enumerate(zip(call(), wanted)):
                assert_close(f"{name}'s {case.kernel}, tensor {i}", got, want, LIMIT[dtype])

    x = case.leaves[0]
    elements = x.numel() if case.kernel != "swiglu" else x.numel() // 2
    moves = case.forward_moves if direction == "forward" else case.both_moves
    streamed = size == "streamed"
    return Row(
        case.kernel, f"{size}: {'x'.join(map(str, x.shape))}", name_of(dtype), direction, calls, check, must=must,
        work=moves * elements * x.element_size(), ceiling="copy_gbytes" if streamed else "",
        aim_share=0.9 if streamed else None,
    )  # fmt: skip


def _separately(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.unflatten(-1, (16, 64)).split((8, 4, 4), -2)
    if weight is not None:
        q, k = ops.rms_norm(q, weight), ops.rms_norm(k, weight)
    return ops.rope(q, cos, sin), ops.rope(k, cos, sin), v


def _entry_rows(dtype: torch.dtype) -> Iterator[Row]:
    """qk_norm_rope beside llmcore's own separate ops: the gain of the fusion."""
    cos, sin = ops.rope_tables(512, 64)
    make = torch.Generator().manual_seed(2)
    for norms in (False, True):
        weight = torch.ones(64, dtype=dtype, requires_grad=True) if norms else None
        x = torch.randn(4, 512, 16 * 64, generator=make).to(dtype).requires_grad_()

        def own(x, *w, cos=cos, sin=sin):
            return ops.qk_norm_rope(x, 8, 4, cos, sin, None, *(w or (None,)) * 2)

        def separate(x, *w, cos=cos, sin=sin):
            return _separately(x, w[0] if w else None, cos, sin)

        case = Case("qk_norm_rope", own, separate, (x, weight) if norms else (x,), 0, 0)
        row = _row(case, "in separate ops", dtype, "forward+backward")
        row.calls["separate ops"] = row.calls.pop("torch eager")
        label = "4x512, 8/4 heads of 64, " + ("norms" if norms else "no norms")
        yield Row(row.kernel, label, row.dtype, row.direction, row.calls, row.check)


def _decode_row(tokens: int, dtype: torch.dtype) -> Row:
    make = torch.Generator().manual_seed(3)
    qkv, weight = torch.randn(tokens, 16 * 64, generator=make).to(dtype), torch.ones(64, dtype=dtype)
    cos, sin = ops.rope_tables(512, 64)
    positions, slots = torch.arange(tokens), torch.arange(tokens) * 17
    caches = [torch.zeros(2, 64, 16, 4, 64, dtype=dtype) for _ in range(2)]

    def own() -> Tensor:
        return ops.qk_norm_rope_cache_write(qkv, 8, 4, *caches[0], slots, cos, sin, positions, weight, weight)

    def separate() -> Tensor:
        q, k, v = qkv.unflatten(-1, (16, 64)).split((8, 4, 4), -2)
        q, k = ops.rms_norm(q, weight), ops.rms_norm(k, weight)
        q, k = ops.rope(q, cos, sin, positions), ops.rope(k, cos, sin, positions)
        ops.kv_cache_write(k, v, *caches[1], slots)
        return q

    def check() -> None:
        assert_close("q", own(), separate(), LIMIT[dtype])
        assert_close("caches", *caches, LIMIT[dtype])

    def repeated(call: Callable) -> Callable:
        return lambda: [call() for _ in range(100)]

    calls = {"llmcore": repeated(own), "separate ops": repeated(separate)}
    label = f"100 times {tokens} tokens, 8/4 heads of 64, norms"
    return Row("qk_norm_rope_cache_write", label, name_of(dtype), "forward", calls, check)


def _route_row(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> Row:
    make = torch.Generator().manual_seed(4)  # distinct in every dtype: torch.topk orders ties in a way of its own
    logits = (torch.rand(tokens, experts, generator=make).argsort(-1) / 8 - 4).to(dtype)

    def peer() -> tuple[Tensor, ...]:
        scores = logits.float().softmax(-1)
        weights, chosen = scores.topk(top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen.int(), scores, *sort_by_torch(chosen.int(), experts)

    def check() -> None:
        routing = ops.moe_route(logits, top_k)
        for got, want in zip(routing, peer()):
            assert_close("routing", got, want, 1e-5)

    calls = {"llmcore": lambda: ops.moe_route(logits, top_k), "torch eager": peer}
    label = f"routing and sort, {tokens} tokens, top {top_k} of {experts}"
    return Row("moe_route", label, name_of(dtype), "forward", calls, check, must={"torch eager": EAGER})


# The tensors of a Llama of 12 layers, d 512, 8/4 heads, feed-forward 1536, vocabulary 8192, tied: 46 M parameters.
LAYER = ((1024, 512), (512, 512), (3072, 512), (512, 1536), (512,), (512,))
SHAPES = ((8192, 512), *LAYER * 12, (512,))
STEP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _adamw_row(dtype: torch.dtype) -> Row:
    """float32 weights, or bfloat16 weights and gradients with float32 masters."""
    make = torch.Generator().manual_seed(5)
    weights, grads = ([torch.randn(s, generator=make).mul_(0.02).to(dtype) for s in SHAPES] for _ in range(2))
    mixed = dtype != torch.float32
    masters = [w.float() for w in weights] if mixed else []
    own_weights = [w.clone() for w in weights]
    means, squares = ([torch.zeros(s) for s in SHAPES] for _ in range(2))
    steps = [torch.zeros(()) for _ in SHAPES]
    parameters = [torch.nn.Parameter(w.float()) for w in weights]
    optimizer = torch.optim.AdamW(parameters, **STEP, fused=True)
    clipped = [p.clone().detach() for p in parameters]  # where clip_grad_norm_, which works in place, finds them

    def own() -> None:
        norm = ops.global_norm(grads)
        ops.adamw_(own_weights, masters, grads, means, squares, steps, **STEP, norm=norm, max_norm=1.0)

    @torch.no_grad()
    def peer() -> None:
        # Gradients are clipped in place: from the second call on they have norm 1, which costs the same time. bf16
        # ones are converted first, as an optimizer of float32 masters needs them.
        for parameter, grad, buffer in zip(parameters, grads, clipped):
            parameter.grad = buffer.copy_(grad) if mixed else buffer
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        if mixed:
            torch._foreach_copy_(weights, parameters)

    def check() -> None:
        for buffer, grad in zip(clipped, grads):
            buffer.copy_(grad)
        own()
        peer()
        for i, parameter in enumerate(parameters):
            assert_close(f"parameter {i}", (masters or own_weights)[i], parameter.detach(), 1e-5)
            assert_close(f"mean {i}", means[i], optimizer.state[parameter]["exp_avg"], 1e-4)
            if mixed:
                assert_close(f"weight {i}", own_weights[i], weights[i], 1e-4)

    count = sum(g.numel() for g in grads)
    # gradients twice, for the norm and the update; master and moments read and written; bf16 weights written
    size = grads[0].element_size()
    return Row(
        "AdamW + clipping", f"{count / 1e6:.0f} M parameters in {len(SHAPES)} tensors", name_of(dtype), "step",
        {"llmcore": own, "torch fused + clip_grad_norm_": peer}, check, must={"torch fused + clip_grad_norm_": 1.2},
        work=count * (2 * size + 24 + (2 if mixed else 0)), ceiling="copy_gbytes", aim_share=0.9,
    )  # fmt: skip


def rows() -> Iterator[Row]:
    # glibc gives memory back to the kernel above twice the largest block freed so far (which then faults in again):
    # as in any longer run, a large one has been freed.
    torch.empty(31 << 20, dtype=torch.uint8)
    for size, shapes in SIZES.items():
        for dtype, shape in shapes.items():
            for case in _cases(*shape, dtype):
                for direction in ("forward", "forward+backward"):
                    yield _row(case, size, dtype, direction)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _entry_rows(dtype)
        yield from (_decode_row(tokens, dtype) for tokens in (1, 16))
        yield from (_route_row(*sizes, dtype) for sizes in ((2048, 8, 2), (8192, 64, 8)))
        yield _adamw_row(dtype)
