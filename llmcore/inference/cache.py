"""A paged key-value cache: fixed-size blocks, handed to sequences as they grow (vLLM, arXiv 2309.06180)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmcore.layers import CacheStep
from llmcore.models import ModelConfig


class Room(NamedTuple):
    """Where new tokens go, in the order of the sequences: `slots` and `positions` of each token, and of each sequence
    its `lengths` with them and the `blocks` that hold it."""

    slots: list[int]
    positions: list[int]
    lengths: list[int]
    blocks: list[list[int]]


class PagedKVCache:
    """Keys and values of every layer for any number of sequences, each known by an integer of the caller's choice.

    Per step: `extend` sequences by the tokens about to be run and give what it returns to the model; `release` a
    sequence when it is done.

    Args:
        config: of the model.
        num_blocks: blocks of `block_size` tokens, shared by all sequences.
        dtype, device: of the caches; those of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks}, block_size {block_size}; accepted: 1 or more each")
        heads, k_dim, v_dim = config.cache_dims
        shape = (config.num_layers, num_blocks, block_size, heads)
        self.block_size, self.num_blocks, self.device = block_size, num_blocks, torch.device(device)
        self.k_caches = list(torch.zeros(*shape, k_dim, dtype=dtype, device=device))
        if config.mla is not None:  # the latent is the value, and part of the key
            self.v_caches = [cache[..., :v_dim] for cache in self.k_caches]
        else:
            self.v_caches = list(torch.zeros(*shape, v_dim, dtype=dtype, device=device))
        self.free_blocks = list(range(num_blocks))
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @staticmethod
    def blocks_for(num_tokens: int, block_size: int = 16) -> int:
        """Blocks that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // block_size)

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Makes room for `counts[i]` more tokens of `sequences[i]`; a new one is added.

        Returns:
            The step for `model(tokens, cache=step)`, its tokens packed in the order of `sequences`.

        Raises:
            ValueError: for a count below 1 or a sequence named twice.
            MemoryError: when the blocks don't suffice; nothing has changed then.
        """
        room = self.make_room(sequences, counts)
        width = max(map(len, room.blocks), default=0)
        starts = [0, *itertools.accumulate(counts)]
        return CacheStep(
            self.k_caches,
            self.v_caches,
            slot_mapping=self._tensor(room.slots, torch.int64),
            block_table=self._tensor(
                [blocks + [0] * (width - len(blocks)) for blocks in room.blocks], torch.int32
            ).view(len(room.blocks), width),
            kv_lens=self._tensor(room.lengths, torch.int32),
            positions=self._tensor(room.positions, torch.int64),
            cu_seqlens_q=None if all(count == 1 for count in counts) else self._tensor(starts, torch.int32),
            sequences=tuple(sequences),
        )

    def make_room(self, sequences: Sequence[int], counts: Sequence[int]) -> Room:
        """What `extend` does, told on the host alone."""
        if len(set(sequences)) != len(sequences) or len(sequences) != len(counts):
            raise ValueError(f"sequences are {list(sequences)}, counts {list(counts)}; accepted: each once, one count")
        if any(count < 1 for count in counts):
            raise ValueError(f"counts are {list(counts)}; accepted: 1 or more each")
        new = [
            self.blocks_for(self.lengths.get(s, 0) + count, self.block_size) - len(self.blocks.get(s, ()))
            for s, count in zip(sequences, counts)
        ]
        if sum(new) > len(self.free_blocks):
            raise MemoryError(
                f"{sum(new)} more cache blocks of {self.block_size} tokens are needed; {len(self.free_blocks)} of "
                f"{self.num_blocks} are free"
            )
        slots: list[int] = []
        positions: list[int] = []
        for sequence, count, num_new in zip(sequences, counts, new):
            blocks = self.blocks.setdefault(sequence, [])
            blocks += [self.free_blocks.pop() for _ in range(num_new)]
            start = self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + count
            span = range(start, start + count)
            positions += span
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
        return Room(slots, positions, [self.lengths[s] for s in sequences], [self.blocks[s] for s in sequences])

    def release(self, sequence: int) -> None:
        """Gives a sequence's blocks back."""
        if sequence not in self.blocks:
            raise KeyError(f"sequence {sequence} is not in the cache; it holds {sorted(self.blocks)}")
        self.free_blocks += self.blocks.pop(sequence)
        del self.lengths[sequence]

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)
