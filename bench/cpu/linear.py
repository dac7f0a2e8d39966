"""Linear layers with few rows, grouped products and the mixture-of-experts block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu import Row, assert_close, name_of
from llmcore import ops
from llmcore.layers import MoE

DTYPES = (torch.bfloat16, torch.float32)
ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
COLD_BYTES = 160 << 20  # of weights that are cycled through: more than the caches hold


def _without_gradient(call: Callable) -> Callable:
    def run(*args):
        with torch.no_grad():
            return call(*args)

    return run


def _linear_rows() -> Iterator[Row]:
    n = k = 4096
    must = {1: 1.4, 4: 1.5, 16: 2.0}
    for dtype in DTYPES:
        nbytes = n * k * dtype.itemsize
        weights = [(torch.randn(n, k) * k**-0.5).to(dtype) for _ in range(-(-COLD_BYTES // nbytes))]
        cold = itertools.cycle(weights)  # shared: no call finds the weight of the one before
        for rows in (1, 4, 16, 32):
            x = torch.randn(rows, k).to(dtype)

            def check(x=x, w=weights[0], dtype=dtype):
                exact = x.double() @ w.double().t()
                for name, function in (("llmcore", ops.linear), ("torch", F.linear)):
                    assert_close(name, function(x, w), exact, ERROR[dtype])

            calls = {
                "llmcore": _without_gradient(lambda x=x, cold=cold: ops.linear(x, next(cold))),
                "torch": _without_gradient(lambda x=x, cold=cold: F.linear(x, next(cold))),
            }
            goals = {"torch": must[rows]} if dtype == torch.bfloat16 and rows in must else {}
            yield Row(
                "linear", f"M {rows}, {n} x {k}, cold", name_of(dtype), "forward", calls, check, goals,
                work=nbytes, ceiling="read_gbytes", aim_share=1.0 if rows <= 16 else None,
            )  # fmt: skip


def _many_rows() -> Iterator[Row]:
    """Where torch's product is taken for ours the ratio is 1."""
    n, k = 1536, 576
    for dtype in (*DTYPES, torch.float16):
        weight = (torch.randn(n, k) * k**-0.5).to(dtype).requires_grad_()
        for rows in (64, 512, 2048):
            x = torch.randn(rows, k).to(dtype).requires_grad_()
            both = {"llmcore": ops.linear, "torch": F.linear}

            def check(x=x, weight=weight, dtype=dtype, both=both):
                exact = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
                wanted = _forward_and_backward(F.linear, exact)()
                for name, function in both.items():
                    assert_close(name, function(x, weight), exact[0] @ exact[1].t(), ERROR[dtype])
                    for got, want in zip(_forward_and_backward(function, [x, weight])(), wanted):
                        assert_close(f"{name}'s gradient", got, want, ERROR[dtype])

            for direction, products in (("forward", 1), ("forward+backward", 3)):
                calls = {
                    name: _forward_and_backward(function, [x, weight])
                    if products == 3
                    else _without_gradient(lambda x=x, weight=weight, function=function: function(x, weight))
                    for name, function in both.items()
                }
                yield Row(
                    "linear", f"M {rows}, {n} x {k}", name_of(dtype), direction, calls, check,
                    work=2 * products * rows * n * k,
                    ceiling=f"gemm_{name_of(dtype)}_gflops" if dtype in DTYPES else "",
                )  # fmt: skip


def _separate_products(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w) for a, w in zip(x.split(offsets.diff().tolist()), weight)])


def _separate_glu(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    gate, up = _separate_products(x, weight, offsets).chunk(2, -1)
    return F.silu(gate) * up


def _forward_and_backward(function: Callable, inputs: list[Tensor], *rest) -> Callable:
    """The function's gradients of `inputs`, which are its first arguments."""
    out = function(*inputs, *rest)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return lambda: torch.autograd.grad(function(*inputs, *rest), inputs, seed)


def _grouped_rows() -> Iterator[Row]:
    experts, n, k = 16, 1024, 1024
    for dtype in DTYPES:
        weight = (torch.randn(experts, n, k) * k**-0.5).to(dtype).requires_grad_()
        for rows in (2, 16, 256):
            x = torch.randn(experts * rows, k).to(dtype).requires_grad_()
            offsets = (torch.arange(experts + 1) * rows).int()
            pairs = {
                "grouped_gemm": (ops.grouped_gemm, _separate_products),
                "grouped_glu": (ops.grouped_glu, _separate_glu),
            }
            for name, (own, peer) in pairs.items():
                both = {
                    "llmcore": _forward_and_backward(own, [x, weight], offsets),
                    "torch": _forward_and_backward(peer, [x, weight], offsets),
                }
                forward = {
                    "llmcore": _without_gradient(lambda own=own, a=(x, weight, offsets): own(*a)),
                    "torch": _without_gradient(lambda peer=peer, a=(x, weight, offsets): peer(*a)),
                }

                def check(calls, dtype=dtype):
                    for got, want in zip(calls["llmcore"](), calls["torch"]()):
                        assert_close("llmcore", got, want, ERROR[dtype])

                case = f"{experts} experts of {rows} rows, {n}x{k}"
                flops = 2.0 * experts * rows * n * k
                gemm = f"gemm_{name_of(dtype)}_gflops"
                for direction, calls, factor in (("forward", forward, 1), ("forward+backward", both, 3)):
                    yield Row(
                        name, case, name_of(dtype), direction, calls, lambda calls=calls, check=check: check(calls),
                        work=flops * factor, ceiling=gemm,
                    )  # fmt: skip


def _transformers_blocks(layer: MoE, dim: int, ffn_dim: int, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """transformers' block with the layer's weights, by each of its ways to run experts; empty where it is missing."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    blocks = {}
    for way in ("eager", "grouped_mm"):
        config = Qwen3MoeConfig(
            hidden_size=dim, moe_intermediate_size=ffn_dim, num_experts=layer.num_experts,
            num_experts_per_tok=layer.top_k, norm_topk_prob=True, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = way
        block = Qwen3MoeSparseMoeBlock(config)
        with torch.no_grad():
            block.gate.weight.copy_(layer.router.weight)
            block.experts.gate_up_proj.copy_(layer.gate_up)
            block.experts.down_proj.copy_(layer.down)
        blocks[f"transformers {way}"] = block.to(dtype)
    return blocks


def _block_step(block: Callable, parameters: list[Tensor], x: Tensor, seed: Tensor) -> Callable:
    """One step of training without the optimizer: gradients are new tensors, as after zero_grad()."""

    def run() -> None:
        for p in [x, *parameters]:
            p.grad = None
        block(x).backward(seed)

    return run


def _moe_rows() -> Iterator[Row]:
    dim, ffn_dim, experts, top_k = 512, 1024, 8, 2
    must = {2048: 1.1, 16: 2.0, 1: 3.0}
    for dtype in DTYPES:
        torch.manual_seed(0)
        layer = MoE(dim, ffn_dim, experts, top_k, balancing="none")
        with torch.no_grad():
            layer.router.weight.normal_(std=0.1)  # choices that the rounding of scores does not turn
        layer.to(dtype)
        peers = _transformers_blocks(layer, dim, ffn_dim, dtype)
        blocks = {"llmcore": lambda x, layer=layer: layer(x).hidden, **peers}
        parameters = {"llmcore": list(layer.parameters()), **{n: list(b.parameters()) for n, b in peers.items()}}
        for tokens in (2048, 16, 1):
            x = torch.randn(1, tokens, dim).to(dtype)
            leaf, seed = x.clone().requires_grad_(), torch.randn(1, tokens, dim).to(dtype)

            def check(blocks=blocks, x=x, dtype=dtype):
                want = blocks["llmcore"](x)
                for name, block in blocks.items():  # a token whose scores tie within bf16 may go elsewhere: 5 %
                    assert_close(name, block(x), want, 5e-2 if dtype == torch.bfloat16 else ERROR[dtype])

            flops = 2.0 * tokens * top_k * 3 * dim * ffn_dim
            forward = {n: _without_gradient(lambda b=b, x=x: b(x)) for n, b in blocks.items()}
            steps = {n: _block_step(b, parameters[n], leaf, seed) for n, b in blocks.items()}
            for direction, calls, factor in (("forward", forward, 1), ("forward+backward", steps, 3)):
                goals = {n: must[tokens] for n in peers} if direction == "forward+backward" else {}
                yield Row(
                    "MoE block", f"{tokens} tokens, d {dim}, ff {ffn_dim}, {experts} experts top {top_k}",
                    name_of(dtype), direction, calls, check, goals, work=flops * factor,
                    ceiling=f"gemm_{name_of(dtype)}_gflops",
                )  # fmt: skip


def rows() -> Iterator[Row]:
    yield from _linear_rows()
    yield from _many_rows()
    yield from _grouped_rows()
    yield from _moe_rows()
