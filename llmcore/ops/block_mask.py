"""Block-sparse attention masks: which blocks of keys a block of queries sees.

The patterns of the literature are unions and intersections of a few kinds: local and strided (Sparse Transformer,
arXiv 1904.10509), local and global (Longformer, arXiv 2004.05150; BigBird, arXiv 2007.14062).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


@dataclass(frozen=True)
class BlockMask:
    """A boolean mask at the granularity of blocks, combined with `&` and `|`.

    Query i sees key j iff `mask[..., i // block_q, j // block_k]`; `causal` and `window` of the attention call cut away
    more. In a packed batch i and j count within their own sequence.

    Attributes:
        mask: bool, (batch or 1, heads or 1, query blocks, key blocks). It must cover every query and key of the call.
        block_q, block_k: block sizes in tokens, >= 1. Multiples of 64 lose no time to partly filled tiles.
    """

    mask: Tensor
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.dim() != 4:
            raise ValueError(
                f"BlockMask: mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; expected bool of shape "
                "(batch or 1, heads or 1, query blocks, key blocks)"
            )
        self._check_blocks(self.block_q, self.block_k)

    @staticmethod
    def _check_blocks(block_q: int, block_k: int) -> None:
        if block_q < 1 or block_k < 1:
            raise ValueError(f"BlockMask: block sizes are {block_q} and {block_k}; they must be at least 1")

    @classmethod
    def _grid(cls, num_q: int, num_k: int, block_q: int, block_k: int, **at_least_0: int) -> tuple[Tensor, Tensor]:
        """Coordinates of query blocks and of key blocks, and checks of what the patterns are made from."""
        cls._check_blocks(block_q, block_k)
        for name, value in {"num_q": num_q, "num_k": num_k, **at_least_0}.items():
            if value < 0:
                raise ValueError(f"BlockMask: {name} is {value}; it must not be negative")
        rows = torch.arange(_blocks(num_q, block_q))[:, None]
        cols = torch.arange(_blocks(num_k, block_k))[None]
        return rows, cols

    @classmethod
    def local(cls, num_q: int, num_k: int, width: int, *, block_q: int = 64, block_k: int = 64) -> BlockMask:
        """Each query block sees the key blocks within `width` blocks (>= 0) of its own on either side."""
        rows, cols = cls._grid(num_q, num_k, block_q, block_k, width=width)
        shift = num_k - num_q  # the last query stands at the last key
        first = (rows * block_q + shift) // block_k - width
        last = (rows * block_q + block_q - 1 + shift) // block_k + width
        return cls(((cols >= first) & (cols <= last))[None, None], block_q, block_k)

    @classmethod
    def global_(cls, num_q: int, num_k: int, count: int, *, block_q: int = 64, block_k: int = 64) -> BlockMask:
        """The first `count` key blocks are seen by all queries, and the first `count` query blocks see all keys."""
        rows, cols = cls._grid(num_q, num_k, block_q, block_k, count=count)
        return cls(((cols < count) | (rows < count))[None, None], block_q, block_k)

    @classmethod
    def strided(cls, num_q: int, num_k: int, stride: int, *, block_q: int = 64, block_k: int = 64) -> BlockMask:
        """Every `stride`-th key block (the last of each run of `stride`) is seen by all queries."""
        if stride < 1:
            raise ValueError(f"BlockMask.strided: stride is {stride}; it must be at least 1")
        rows, cols = cls._grid(num_q, num_k, block_q, block_k)
        return cls(((cols % stride == stride - 1) & (rows >= 0))[None, None], block_q, block_k)

    def _check_same_blocks(self, other: BlockMask) -> None:
        if (self.block_q, self.block_k) != (other.block_q, other.block_k):
            raise ValueError(
                f"BlockMask: blocks of {self.block_q}x{self.block_k} cannot be combined with blocks of "
                f"{other.block_q}x{other.block_k}"
            )

    def __or__(self, other: BlockMask) -> BlockMask:
        self._check_same_blocks(other)
        return BlockMask(self.mask | other.mask, self.block_q, self.block_k)

    def __and__(self, other: BlockMask) -> BlockMask:
        self._check_same_blocks(other)
        return BlockMask(self.mask & other.mask, self.block_q, self.block_k)

    def dense(self, num_q: int, num_k: int) -> Tensor:
        """bool (batch or 1, heads or 1, num_q, num_k): the mask per element."""
        wide = self.mask.repeat_interleave(self.block_q, -2).repeat_interleave(self.block_k, -1)
        if wide.shape[-2] < num_q or wide.shape[-1] < num_k:
            raise ValueError(
                f"BlockMask covers {wide.shape[-2]} x {wide.shape[-1]} tokens, but {num_q} x {num_k} are asked for"
            )
        return wide[..., :num_q, :num_k]
