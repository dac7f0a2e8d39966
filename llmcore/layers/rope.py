"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcore import ops


class RotaryEmbedding(nn.Module):
    """Rotates the first `rotary_dim` features of every head by angles that grow with the position
    (RoFormer, arXiv 2104.09864).

    The float32 tables `cos` and `sin` of shape (max_positions, rotary_dim / 2) are no part of the state dict, and
    stay float32 when the model is cast: bfloat16 can't tell neighbouring positions of a long text apart.

    Args:
        rotary_dim: rotated features of a head, even; the rest of the head passes unchanged.
        max_positions: positions the tables hold.
        base: the longest wavelength is about 2 pi * base positions.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        scaling: of the frequencies, for texts longer than those of the training.
    """

    def __init__(
        self,
        rotary_dim: int,
        max_positions: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: ops.RopeScaling | None = None,
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim is {rotary_dim}; accepted: an even number of at least 2")
        self.rotary_dim, self.max_positions, self.base, self.interleaved = rotary_dim, max_positions, base, interleaved
        self.scaling = scaling
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.build_tables(torch.get_default_device())

    def build_tables(self, device: torch.device | str) -> None:
        """Makes the tables anew, on `device`."""
        if torch.device(device).type == "meta":  # where arithmetic makes torch import its compiler: a second
            shape = (self.max_positions, self.rotary_dim // 2)
            self.cos, self.sin = (torch.empty(shape, dtype=torch.float32, device="meta") for _ in range(2))
            return
        tables = ops.rope_tables(self.max_positions, self.rotary_dim, self.base, device, scaling=self.scaling)
        self.cos, self.sin = tables

    def _apply(self, fn, recurse=True):
        """Rebuilds the tables after a move or cast, so that `.to(bfloat16)` and `to_empty()` leave them right."""
        super()._apply(fn, recurse)
        self.build_tables(self.cos.device)
        return self

    def check_length(self, seq: int) -> None:
        """A ValueError when positions 0 to seq - 1 are more than the tables hold."""
        if seq > self.max_positions:
            raise ValueError(f"{seq} positions; accepted: at most max_positions = {self.max_positions}")

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotates queries or keys.

        Args:
            x: (batch, seq, heads, head_dim) or (total, heads, head_dim).
            positions: (batch, seq) or (total,), int32 or int64; without, 0, 1, ... along the third dimension from
                the end.

        Raises:
            ValueError: when seq is more than max_positions. A position outside the tables is the op's error.
        """
        if positions is None:
            self.check_length(x.shape[-3])
        return ops.rope(x, self.cos, self.sin, positions, interleaved=self.interleaved)
