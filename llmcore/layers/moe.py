"""Mixture of experts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.mlp import GatedMLP, check_gated, gated
from llmcore.layers.quantized_experts import QuantizedExperts

BALANCING = ("aux_loss", "bias", "none")


def _check_finite(logits: Tensor) -> None:
    if math.isfinite(logits.sum().item()):  # one pass; a sum of finite scores may overflow, so that proves nothing yet
        return
    finite = torch.isfinite(logits).all(-1)
    if not finite.all():
        raise FloatingPointError(f"the router's scores of token {int((~finite).nonzero()[0])} are not finite")


def _products(
    x: Tensor, weight: Tensor | QuantizedExperts, bias: Tensor | None, routing: ops.Routing, *, gather: bool
) -> Tensor:
    """Of each expert's rows with its weight, and its bias. With `gather`, x holds the tokens, else the rows."""
    token_of, row_of = (routing.token_of, routing.row_of) if gather else (None, None)
    if isinstance(weight, QuantizedExperts):
        return weight(x, routing.offsets, token_of=token_of, bias=bias)
    y = ops.grouped_gemm(x, weight, routing.offsets, token_of=token_of, row_of=row_of)
    if bias is None:
        return y
    return y + bias[torch.repeat_interleave(routing.offsets.diff(), output_size=len(y))]


class MoEOutput(NamedTuple):
    """hidden: as the input; aux_loss: weighted scalar, None unless balancing is "aux_loss"; expert_load:
    (num_experts,) int64, the (token, choice) pairs each routed expert got."""

    hidden: Tensor
    aux_loss: Tensor | None
    expert_load: Tensor


class MoE(nn.Module):
    """Gated feed-forward experts of which each token takes `top_k`, beside shared experts that every token takes
    (DeepSeekMoE, arXiv 2401.06066).

    Experts are kept in balance by one of
      - "aux_loss": the loss of Switch Transformers (arXiv 2101.03961), num_experts * sum_e f_e P_e times `aux_weight`:
        f_e is the share of choices that fell on expert e, P_e its mean share of the router's scores; 1 in balance;
      - "bias": a bias per expert in the choice alone, moved by `bias_rate` after each step
        (`update_expert_bias`; arXiv 2408.15664), with no loss that bends the gradient;
      - "none".

    Args:
        dim, ffn_dim: features in and out, and inside one expert.
        num_experts, top_k: routed experts, and how many of them a token takes.
        shared_experts: experts that every token takes, run as one feed-forward layer of shared_experts * ffn_dim.
        activation: "swiglu", "geglu" or "swiglu_oss".
        score, num_groups, topk_groups, renormalize, scale: see `llmcore.ops.moe_route`.
        bias: biases of the router and of the routed experts.

    Weights: `router.weight` (num_experts, dim), used in float32; `gate_up` (num_experts, 2 * ffn_dim, dim), the
    gate's rows first; `down` (num_experts, dim, ffn_dim); with bias `gate_up_bias` (num_experts, 2 * ffn_dim) and
    `down_bias` (num_experts, dim). The buffer `expert_bias` (num_experts,) stays float32. For inference `gate_up` and
    `down` may be `QuantizedExperts`.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int,
        *,
        shared_experts: int = 0,
        activation: str = "swiglu",
        score: str = "softmax",
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        balancing: str = "aux_loss",
        aux_weight: float = 0.01,
        bias_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        check_gated(activation)
        if balancing not in BALANCING:
            raise ValueError(f"balancing is {balancing!r}; accepted: {', '.join(map(repr, BALANCING))}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; accepted: 1 to num_experts = {num_experts}")
        if shared_experts < 0:
            raise ValueError(f"shared_experts is {shared_experts}; accepted: 0 or more")
        self.num_experts, self.top_k, self.activation = num_experts, top_k, activation
        self.balancing, self.aux_weight, self.bias_rate = balancing, aux_weight, bias_rate
        self.routing = {
            "score": score,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "renormalize": renormalize,
            "scale": scale,
        }
        self.router = nn.Linear(dim, num_experts, bias=bias)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, dim).normal_(std=0.02))
        self.down = nn.Parameter(torch.empty(num_experts, dim, ffn_dim).normal_(std=0.02))
        self.gate_up_bias = nn.Parameter(torch.zeros(num_experts, 2 * ffn_dim)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim)) if bias else None
        self.shared = GatedMLP(dim, shared_experts * ffn_dim, activation) if shared_experts else None
        bias = torch.zeros(num_experts, dtype=torch.float32) if balancing == "bias" else None
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn, recurse=True):
        """Keeps `expert_bias` in float32 when the model is cast: steps of 0.001 would be lost in bfloat16."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def set_quantized(self, name: str, weight: QuantizedExperts) -> None:
        """Puts quantised experts in the place of the parameter `name`, "gate_up" or "down"."""
        delattr(self, name)  # torch lets no module take a parameter's name
        setattr(self, name, weight)

    def forward(self, x: Tensor) -> MoEOutput:
        """x: (..., dim); leading dimensions are tokens.

        Raises:
            FloatingPointError: for a token whose scores are not finite (looked for on the CPU only): no expert is the
                better choice then.
        """
        tokens = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        router_bias = None if self.router.bias is None else self.router.bias.to(wide)
        logits = F.linear(tokens.to(wide), self.router.weight.to(wide), router_bias)
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_finite(logits)
        routing = ops.moe_route(logits, self.top_k, bias=self.expert_bias, **self.routing)
        hidden = ops.moe_combine(self._experts(tokens, routing), routing.weights, routing.row_of)
        if self.shared is not None:
            hidden = hidden + self.shared(tokens)
        load = routing.offsets.diff().long()
        return MoEOutput(hidden.view_as(x), self._aux_loss(routing.scores, load), load)

    def _experts(self, tokens: Tensor, routing: ops.Routing) -> Tensor:
        """What each token's experts give, (rows, dim) in the order of routing.row_of."""
        quantized = isinstance(self.gate_up, QuantizedExperts)
        if not quantized and self.gate_up_bias is None and self.activation != "swiglu_oss":
            inner = ops.grouped_glu(
                tokens, self.gate_up, routing.offsets, token_of=routing.token_of, row_of=routing.row_of,
                activation=self.activation,
            )  # fmt: skip
        else:
            inner = gated(self.activation, _products(tokens, self.gate_up, self.gate_up_bias, routing, gather=True))
        return _products(inner, self.down, self.down_bias, routing, gather=False)

    def _aux_loss(self, scores: Tensor, load: Tensor) -> Tensor | None:
        if self.balancing != "aux_loss":
            return None
        choices = load.float() / load.sum().clamp(min=1)
        # softmax scores sum to 1 already; sigmoid scores are normalised first (DeepSeek-V3, arXiv 2412.19437, eq. 19)
        # their sum may be 0: the sigmoid of less than -104 is
        total = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        share = (scores / total).sum(0) / max(len(scores), 1)
        return self.aux_weight * self.num_experts * (choices * share).sum()

    @torch.no_grad()
    def update_expert_bias(self, expert_load: Tensor) -> None:
        """Raises the bias of experts with less than the mean load by `bias_rate` and lowers that of the others.

        Args:
            expert_load: (num_experts,), the load of the whole optimizer step, over all its micro-batches (and ranks).
        """
        if self.expert_bias is None:
            raise RuntimeError(f"balancing is {self.balancing!r}; an expert bias is there with 'bias' only")
        load = expert_load.to(self.expert_bias)
        self.expert_bias += self.bias_rate * (load.mean() - load).sign()
