"""Feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.linear import Linear

GATED = ("swiglu", "geglu", "swiglu_oss")
PLAIN = ("gelu", "gelu_erf", "relu")
ACTIVATIONS = (*GATED, *PLAIN)


def check_gated(activation: str) -> None:
    if activation not in GATED:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(map(repr, GATED))}")


def gated(activation: str, gate_up: Tensor) -> Tensor:
    """act(gate) * up of the halves of gate_up, (..., 2 * ffn_dim), with silu in "swiglu" and gelu, its tanh form, in
    "geglu" (arXiv 2002.05202). "swiglu_oss" is that of gpt-oss (arXiv 2508.10925): gate * sigmoid(1.702 * gate) *
    (up + 1), with gate at most 7 and up within -7 to 7. Gives (..., ffn_dim)."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swiglu_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return ops.swiglu(gate, up) if activation == "swiglu" else ops.geglu(gate, up)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), `activation` "swiglu" or "geglu"; `gate_up.weight` holds the gate's rows first."""

    def __init__(self, dim: int, ffn_dim: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        check_gated(activation)
        self.activation = activation
        self.gate_up = Linear(dim, 2 * ffn_dim, bias=bias)
        self.down = Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim). Gives (..., dim)."""
        return self.down(gated(self.activation, self.gate_up(x)))


def plain(activation: str, x: Tensor) -> Tensor:
    """An activation without a gate: "gelu" in its tanh form, as in GPT-2, "gelu_erf" exactly, as in BERT, "relu"."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if activation == "gelu_erf" else "tanh")


class MLP(nn.Module):
    """down(act(up(x))), `activation` as in `plain`."""

    def __init__(self, dim: int, ffn_dim: int, bias: bool = True, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(dim, ffn_dim, bias=bias)
        self.down = Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim). Gives (..., dim)."""
        return self.down(plain(self.activation, self.up(x)))


def make_mlp(activation: str, dim: int, ffn_dim: int, bias: bool = False) -> nn.Module:
    """The feed-forward layer of `activation`, gated or plain."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(map(repr, ACTIVATIONS))}")
    if activation in PLAIN:
        return MLP(dim, ffn_dim, bias, activation)
    return GatedMLP(dim, ffn_dim, activation, bias)
