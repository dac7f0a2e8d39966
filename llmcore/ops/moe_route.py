"""The router of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.moe_permute import sort_by_torch
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


class Routing(NamedTuple):
    """What `moe_route` gives: each token's experts with their weights, and the rows of a stable sort of these (token,
    slot) pairs by expert (see `llmcore.ops.moe_sort`)."""

    weights: Tensor  # (tokens, top_k) float32
    experts: Tensor  # (tokens, top_k) int32, best first
    scores: Tensor  # (tokens, num_experts) float32
    offsets: Tensor  # (num_experts + 1,) int32
    row_of: Tensor  # (tokens, top_k) int32
    token_of: Tensor  # (tokens * top_k,) int32


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Chooses top_k experts for every token, weighs them, and sorts the (token, slot) pairs by expert.

    1. scores = softmax(logits) or sigmoid(logits), in float32.
    2. The choice is made by c = scores + bias. The bias steers the load and enters nothing else: auxiliary-loss-free
       balancing (arXiv 2408.15664).
    3. With topk_groups < num_groups, only experts of the topk_groups best groups can be chosen; group g holds the
       experts g * num_experts / num_groups onwards. A group is worth its largest c when score is "softmax" and there
       is no bias (DeepSeek-V2, arXiv 2405.04434), else the sum of its two largest c (DeepSeek-V3, arXiv 2412.19437).
       Experts of the other groups are never chosen, however low the c of those that are left.
    4. The top_k largest c are chosen, largest first; among equals (of experts and of groups) the lower index wins.
    5. weights = scale * the chosen scores, without bias, divided by their sum when `renormalize` (by the smallest
       normal float32 where the sum is below it).
    6. offsets, row_of and token_of are `moe_sort` of the choice.

    Gradients of weights and scores reach logits; the choice has none.

    Args:
        logits: (tokens, num_experts), float32, bfloat16 or float16 (float64 through the reference).
        top_k: experts per token, at most the number of experts in topk_groups groups.
        score: "softmax" or "sigmoid".
        bias: (num_experts,) float32, finite.
        num_groups: divides num_experts.
        topk_groups: 1 to num_groups.
        renormalize: whether each token's weights sum to `scale`.
        scale: factor on the weights.

    Returns:
        `Routing`.

    Raises:
        RuntimeError: naming the token, when its scores are not numbers: a NaN logit or, under softmax, +inf or
            nothing but -inf. On a CUDA device nobody looks: there such a token gets the experts 0 to top_k - 1, with
            weights of NaN, so that the loss shows it. The same for a bias that is NaN.
    """
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"moe_route: score is {score!r}; accepted: 'softmax', 'sigmoid'")
    if not use_kernel("moe_route", logits):
        return Routing(
            *reference.moe_route(
                logits, top_k, score=score, bias=bias, num_groups=num_groups, topk_groups=topk_groups,
                renormalize=renormalize, scale=scale,
            )
        )  # fmt: skip
    return Routing(
        *torch.ops.llmcore.moe_route(
            logits, top_k, score == "sigmoid", bias, num_groups, topk_groups, renormalize, scale
        )
    )


@register_fake("moe_route")
def _(logits, top_k, sigmoid, bias, num_groups, topk_groups, renormalize, scale):
    tokens, num_experts = logits.shape
    return (
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((tokens, num_experts), dtype=torch.float32),
        logits.new_empty((num_experts + 1,), dtype=torch.int32),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((tokens * top_k,), dtype=torch.int32),
    )


@register_fake("moe_route_backward")
def _(dweights, dscores, scores, experts, sigmoid, renormalize, scale):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, _, sigmoid, _, _, _, renormalize, scale = inputs
    _, experts, scores, *plan = output
    ctx.arguments = (sigmoid, renormalize, scale)
    ctx.dtype = logits.dtype
    ctx.save_for_backward(scores, experts)
    ctx.mark_non_differentiable(experts, *plan)
    ctx.set_materialize_grads(False)


def _backward(ctx, dweights, _, dscores, *__):
    scores, experts = ctx.saved_tensors
    dlogits = torch.ops.llmcore.moe_route_backward(dweights, dscores, scores, experts, *ctx.arguments)
    return dlogits.to(ctx.dtype), None, None, None, None, None, None, None


torch.library.register_autograd("llmcore::moe_route", _backward, setup_context=_save)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def logits(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def bias(n: int) -> Tensor:
        return (torch.randn(n, generator=make) * 0.1).to(device)

    for shape, top_k in (((1, 1), 1), ((3, 5), 2), ((33, 8), 2), ((7, 59), 6), ((5, 64), 64)):
        yield Sample(f"softmax {shape} top {top_k}", (logits(*shape), top_k), {}, (0,))
    for shape, top_k in (((3, 7), 2), ((17, 111), 8)):
        yield Sample(f"sigmoid {shape} top {top_k}", (logits(*shape), top_k), {"score": "sigmoid"}, (0,))
    yield Sample("not renormalised", (logits(9, 16), 4), {"renormalize": False, "scale": 2.5}, (0,))
    groups = {"num_groups": 8, "topk_groups": 3}
    yield Sample("groups by their best", (logits(20, 64), 6), groups, (0,))
    yield Sample("groups by their best two", (logits(20, 64), 6), {"score": "sigmoid", "scale": 2.5, **groups}, (0,))
    yield Sample("groups and bias", (logits(20, 64), 6), {"score": "sigmoid", "bias": bias(64), **groups}, (0,))
    yield Sample("softmax, groups and bias", (logits(20, 64), 6), {"bias": bias(64), **groups}, (0,))
    yield Sample("groups of one", (logits(6, 8), 2), {"bias": bias(8), "num_groups": 8, "topk_groups": 3}, (0,))
    yield Sample("negative biased scores", (logits(6, 8), 3), {"bias": bias(8) - 5, "num_groups": 4, "topk_groups": 2})
    yield Sample("ties", (torch.tensor([[1.0, 3, 3, 1, 3, 1, 1, 1]] * 3).to(device, dtype), 5), {}, ())
    yield Sample("tied groups", (torch.zeros(3, 12).to(device, dtype), 3), {"num_groups": 4, "topk_groups": 2}, ())
    yield Sample("ties across vectors", (torch.zeros(2, 40).to(device, dtype), 37), {}, ())
    masked = logits(4, 10)
    masked[:, 3:] = float("-inf")
    yield Sample("masked experts", (masked, 5), {}, ())
    yield Sample("strided", (logits(12, 40)[::2, 3:19], 3), {}, (0,))
    yield Sample("transposed", (logits(16, 9).t(), 3), {}, (0,))
    yield Sample("no tokens", (logits(0, 8), 2), {}, (0,))
    for shape, top_k, options in (
        ((40, 128), 8, {}),
        ((5, 200), 8, {"score": "sigmoid", "bias": bias(200), "num_groups": 4, "topk_groups": 2}),
        ((70, 512), 16, {"bias": bias(512)}),
        ((6, 513), 20, {}),
        ((6, 600), 40, {"score": "sigmoid", "num_groups": 100, "topk_groups": 8}),
    ):
        yield Sample(f"large {shape} top {top_k}", (logits(*shape), top_k), options, (0,))
    yield Sample("many tokens", (logits(700, 64), 4), {"score": "sigmoid", "bias": bias(64)}, (0,))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    # Distinct in every dtype: torch.topk orders ties in a way of its own.
    logits = (torch.rand(8192, 64, generator=make).argsort(-1) / 8 - 4).to(device, dtype)
    yield Sample("8192 tokens, top 8 of 64", (logits, 8), {}, (0,))
    logits = (torch.rand(32768, 128, generator=make).argsort(-1) / 16 - 4).to(device, dtype)
    yield Sample("32768 tokens, top 8 of 128", (logits, 8), {}, (0,))


def _peer(logits: Tensor, top_k: int, *, renormalize: bool = True, scale: float = 1.0):
    """torch's own way without groups and bias."""
    scores = logits.float().softmax(-1)
    weights, experts = scores.topk(top_k)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts.int(), scores, *sort_by_torch(experts.int(), logits.shape[1])


register(
    OpSpec(
        name="moe_route",
        op=moe_route,
        reference=reference.moe_route,
        torch_ops=("moe_route", "moe_route_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("softmax", "sigmoid", "selection bias", "group-limited choice", "sorted by expert", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: s.args[0].numel() * (s.args[0].element_size() + 4),
    )
)
