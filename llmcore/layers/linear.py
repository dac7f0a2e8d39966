"""Linear layers whose few rows, as in decoding, take llmcore's kernel."""

from __future__ import annotations

from torch import Tensor, nn

from llmcore import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `llmcore.ops.linear`; its parameters and their names are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Gives (..., out_features)."""
        return ops.linear(x, self.weight, self.bias)
