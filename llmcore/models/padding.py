"""Padded batches as packed ones, so that no layer computes on padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are.

    Attributes:
        shape: (batch, seq) of the batch.
        index: (total,) int64, the places of the tokens in the flattened batch.
        cu_seqlens: (batch + 1,) int32, where each sequence's tokens begin among the packed ones.
        max_seqlen: tokens of the longest sequence.
    """

    shape: tuple[int, int]
    index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, mask: Tensor, shape: tuple[int, int]) -> Packing:
        """Of a batch of `shape`. The number of tokens is read back from a GPU.

        Args:
            mask: (batch, seq), true (or 1) where a token is: one run in each row; or (batch,) integers, the tokens of
                each row, padding behind them.

        Raises:
            ValueError: for another shape, a length beyond the row, or a row with padding between its tokens.
        """
        if mask.ndim == 1 and mask.shape == shape[:1] and mask.dtype in (torch.int32, torch.int64):
            if len(mask) and not 0 <= int(mask.min()) <= int(mask.max()) <= shape[1]:
                raise ValueError(f"mask is {mask.tolist()}; accepted as lengths: 0 to {shape[1]} each")
            mask = torch.arange(shape[1], device=mask.device) < mask[:, None]
        if mask.shape != shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; accepted: {tuple(shape)}, or ({shape[0]},) lengths")
        mask = mask.bool()
        starts = mask & ~F.pad(mask[:, :-1], (1, 0))
        if (broken := (starts.sum(1) > 1).nonzero()).numel():
            raise ValueError(f"row {int(broken[0])} of the mask has padding between its tokens; accepted: one run")
        lengths = mask.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(tuple(shape), mask.flatten().nonzero()[:, 0], cu_seqlens, int(lengths.max()) if len(lengths) else 0)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seq, ...) -> (total, ...)."""
        return x.flatten(0, 1)[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """(total, ...) -> (batch, seq, ...), zeros for padding."""
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy(0, self.index, x).unflatten(0, self.shape)
