"""Experts' matrices that stay quantised in memory; for inference only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops.quantized_linear import FORMATS, format_named


class QuantizedExperts(nn.Module):
    """One quantised weight per expert, in place of a parameter (num_experts, rows, k) of `MoE`; for calls that ask for
    no gradient.

    The experts' rows may come in parts of different formats, one below the other, as those of the gate and of the up
    projection. Adjacent parts of one format are joined.

    Args:
        parts: (format, blocks) of each part, top to bottom; blocks (num_experts, rows, bytes of a row) uint8 as in a
            GGUF file.

    Attributes:
        parts: (format, rows of an expert) of each part; its packed weights are the buffer `packed0`, `packed1`, ...
    """

    def __init__(self, parts: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        sizes = {(len(b), b.shape[2] // format_named(f).bytes * FORMATS[f].block) for f, b in parts}
        if len(sizes) != 1:
            raise ValueError(f"the parts have {sorted(sizes)} experts and weights in a row; accepted: the same in all")
        self.num_experts, self.in_features = sizes.pop()
        self.parts: list[tuple[str, int]] = []
        for format, same in groupby(parts, key=lambda part: part[0]):
            blocks = [blocks for _, blocks in same]
            joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
            self.register_buffer(f"packed{len(self.parts)}", ops.pack_experts(joined, format))
            self.parts.append((format, joined.shape[1]))
        self.out_features = sum(rows for _, rows in self.parts)

    @property
    def num_weights(self) -> int:
        return self.num_experts * self.in_features * self.out_features

    def forward(
        self, x: Tensor, offsets: Tensor, *, token_of: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """As `ops.quantized_grouped_linear`: gives (rows, out_features)."""
        products, begin = [], 0
        for i, (format, rows) in enumerate(self.parts):
            part_bias = None if bias is None else bias[:, begin : begin + rows]
            packed = getattr(self, f"packed{i}")
            products.append(
                ops.quantized_grouped_linear(x, packed, format, rows, offsets, token_of=token_of, bias=part_bias)
            )
            begin += rows
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{format} x {rows}" for format, rows in self.parts)
        return f"num_experts={self.num_experts}, in_features={self.in_features}, rows=[{parts}]"
