"""A whole mixture-of-experts layer for bench/gpu.py: `llmcore.layers.MoE` (router, choice and sort, gathered product
with SwiGLU, second product, combination) beside the same composed of torch's operators and `torch._grouped_mm`.

All are functions of (tokens, router, gate_up, down), which have the gradients. Nothing in them waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmcore
from llmcore.layers import MoE
from llmcore.ops import OpSpec, Sample, registry


@functools.cache
def _layer(dim: int, ffn_dim: int, num_experts: int, top_k: int) -> MoE:
    """Without weights of its own."""
    with torch.device("meta"):
        return MoE(dim, ffn_dim, num_experts, top_k, balancing="none")


def layer(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int) -> Tensor:
    experts, dim, ffn_dim = down.shape
    weights = {"router.weight": router, "gate_up": gate_up, "down": down}
    return torch.func.functional_call(_layer(dim, ffn_dim, experts, top_k), weights, (x,)).hidden


def reference(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int) -> Tensor:
    with llmcore.backend("reference"):
        return layer(x, router, gate_up, down, top_k=top_k)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])


def add_to_tokens(y: Tensor, weights: Tensor, row_of: Tensor, token_of: Tensor) -> Tensor:
    """Each row, weighted, is added to its token's."""
    of_rows = torch.empty_like(weights).flatten().scatter(0, row_of.flatten().long(), weights.flatten())
    out = y.new_zeros(len(weights), y.shape[1])
    return out.index_add(0, token_of, y * of_rows.to(y.dtype).unsqueeze(1))


def gather_rows(y: Tensor, weights: Tensor, row_of: Tensor, token_of: Tensor) -> Tensor:
    """Each token's rows are brought together, and summed as a product with its weights."""
    rows = y.index_select(0, row_of.flatten()).view(*row_of.shape, -1)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), rows).squeeze(1)


def composed(combine: Callable, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int) -> Tensor:
    logits = F.linear(x.float(), router.float())
    weights, _, _, offsets, row_of, token_of = registry["moe_route"].peer(logits, top_k)
    gate, up = grouped_mm(x.index_select(0, token_of), gate_up, offsets).chunk(2, -1)
    return combine(grouped_mm(F.silu(gate) * up, down, offsets), weights, row_of, token_of)


def peers() -> dict[str, Callable]:
    return {
        "torch": functools.partial(composed, add_to_tokens),
        "torch_gathered": functools.partial(composed, gather_rows),
        "torch_compiled": torch.compile(functools.partial(composed, gather_rows), dynamic=False),
    }


def sample(dtype: torch.dtype, device: str, *, tokens: int, dim: int, ffn_dim: int, experts: int, top_k: int) -> Sample:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shapes = (experts, dim), (experts, 2 * ffn_dim, dim), (experts, dim, ffn_dim)
    weights = (randn(*shape) * shape[-1] ** -0.5 for shape in shapes)
    label = f"{tokens} tokens, top {top_k} of {experts}, {dim}x{ffn_dim}"
    return Sample(label, (randn(tokens, dim), *weights), {"top_k": top_k}, (0, 1, 2, 3))


def _flops(sample: Sample) -> float:
    """Of the products of the experts."""
    x, _, _, down = sample.args
    return 2.0 * len(x) * sample.kwargs["top_k"] * 3 * down.shape[1] * down.shape[2]


# No op of the registry, but timed like one.
SPEC = OpSpec(name="moe_layer", op=layer, reference=reference, torch_ops=(), samples=lambda *_: iter(()), flops=_flops)
