"""A paged key-value cache: fixed-size blocks, handed to sequences as they grow (vLLM, arXiv 2309.06180)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore import _C
from llmcore.layers import CacheStep
from llmcore.models import ModelConfig

_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class Room(NamedTuple):
    """Where new tokens go, in the order of the sequences: `slots` and `positions` of each token, and of each sequence
    its `lengths` with them and the `blocks` that hold it."""

    slots: list[int]
    positions: list[int]
    lengths: list[int]
    blocks: list[list[int]]


@dataclass
class _Held:
    """What a sequence holds: its blocks and tokens in them; and of its full blocks, how many others may find, and the
    allocator's number for what these hold, which is `salt` while there are none."""

    salt: int = 0
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    published: int = 0
    content: int = 0


@dataclass(frozen=True)
class Saved:
    """The keys and values of a sequence outside the cache (see `PagedKVCache.swap_out`)."""

    tensors: list[Tensor]
    held: _Held


def cache_zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`; on the CPU on pages of 2 MiB where the system grants them: a large cache is made sooner, since
    each page fault clears as much, and reading it takes fewer translations of addresses."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.device.type == "cpu":
        _C.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made.zero_()


class PagedKVCache:
    """Keys and values of every layer for any number of sequences, each known by an integer of the caller's choice.

    Per step: `extend` sequences by the tokens about to be run and give what it returns to the model; `release` a
    sequence when it is done. Sequences share blocks after a `fork`, and where `find_prefix` knows what `publish` told;
    a block that others hold too is copied before it is written to.

    Args:
        config: of the model.
        num_blocks: blocks of `block_size` tokens, shared by all sequences.
        dtype, device: of the caches. Of int8 and float8_e4m3fn there is a scale for each token and head.
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
        if config.mla is not None and dtype in _EIGHT_BITS:
            raise ValueError(f"dtype is {dtype}; accepted with latent attention: float32, bfloat16, float16")
        heads, k_dim, v_dim = config.cache_dims
        shape = (config.num_layers, num_blocks, block_size, heads)
        self.block_size, self.num_blocks, self.device = block_size, num_blocks, torch.device(device)
        self._tensors = [cache_zeros((*shape, k_dim), dtype=dtype, device=device)]
        self.k_caches = list(self._tensors[0])
        self.k_scales = self.v_scales = None
        if config.mla is not None:  # the latent is the value, and part of the key
            self.v_caches = [cache[..., :v_dim] for cache in self.k_caches]
        else:
            self._tensors.append(cache_zeros((*shape, v_dim), dtype=dtype, device=device))
            self.v_caches = list(self._tensors[1])
        if dtype in _EIGHT_BITS:
            scales = [torch.zeros(shape, device=device) for _ in range(2)]
            self._tensors += scales
            self.k_scales, self.v_scales = (list(s) for s in scales)
        self._allocator = _C.BlockAllocator(num_blocks, block_size)
        self._held: dict[int, _Held] = {}

    @staticmethod
    def blocks_for(num_tokens: int, block_size: int = 16) -> int:
        """Blocks that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // block_size)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds; some may hold prefixes that can still be found."""
        return self._allocator.num_free

    @property
    def sequences(self) -> list[int]:
        return list(self._held)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._held

    def length(self, sequence: int) -> int:
        """Tokens of a sequence in the cache; 0 for one that it does not hold."""
        return self._held[sequence].length if sequence in self._held else 0

    def blocks(self, sequence: int) -> list[int]:
        """The blocks that hold a sequence, in order."""
        return list(self._find(sequence).blocks)

    def blocks_needed(self, sequence: int, count: int) -> int:
        """Blocks that must be free for `count` more tokens of a sequence."""
        held = self._held.get(sequence)
        if held is None:
            return self.blocks_for(count, self.block_size)
        size, length = self.block_size, held.length
        more = -(-(length + count) // size) - len(held.blocks)
        return more + (count > 0 and length % size > 0 and self._is_shared(held.blocks[-1]))

    def _is_shared(self, block: int) -> bool:
        return self._allocator.references(block) > 1

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
            k_scales=self.k_scales,
            v_scales=self.v_scales,
            sequences=tuple(sequences),
        )

    def make_room(self, sequences: Sequence[int], counts: Sequence[int]) -> Room:
        """What `extend` does, told on the host alone."""
        if len(set(sequences)) != len(sequences) or len(sequences) != len(counts):
            raise ValueError(f"sequences are {list(sequences)}, counts {list(counts)}; accepted: each once, one count")
        if any(count < 1 for count in counts):
            raise ValueError(f"counts are {list(counts)}; accepted: 1 or more each")
        needed = [self.blocks_needed(s, count) for s, count in zip(sequences, counts)]
        if sum(needed) > self.num_free_blocks:
            raise MemoryError(
                f"{sum(needed)} more cache blocks of {self.block_size} tokens are needed; {self.num_free_blocks} of "
                f"{self.num_blocks} are free"
            )
        slots: list[int] = []
        positions: list[int] = []
        copies: list[tuple[int, int]] = []
        size, rows = self.block_size, []
        for sequence, count, num_new in zip(sequences, counts, needed):
            held = self._held.get(sequence)
            if held is None:
                held = self._held[sequence] = _Held()
            begin = held.length
            if num_new:
                blocks = self._allocator.take(self.blocks_needed(sequence, count))  # less, where a sharer got its copy
                if begin % size and self._is_shared(held.blocks[-1]):
                    copies.append((held.blocks[-1], blocks[0]))
                    self._allocator.release(held.blocks[-1:])
                    held.blocks[-1:] = blocks[:1]
                    blocks = blocks[1:]
                held.blocks += blocks
            held.length = begin + count
            if count == 1:
                positions.append(begin)
                slots.append(held.blocks[begin // size] * size + begin % size)
            else:
                span = range(begin, begin + count)
                positions += span
                slots += [held.blocks[p // size] * size + p % size for p in span]
            rows.append(held)
        self._copy(copies)
        return Room(slots, positions, [held.length for held in rows], [held.blocks for held in rows])

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, targets = (self._tensor(list(ids), torch.int64) for ids in zip(*copies))
            for tensor in self._tensors:
                tensor[:, targets] = tensor[:, sources]

    def fork(self, parent: int, child: int) -> None:
        """Adds `child`, which holds what `parent` does, in the same blocks."""
        held = self._find(parent)
        if child in self._held:
            raise ValueError(f"sequence {child} is in the cache already")
        self._allocator.share(held.blocks)
        self._held[child] = _Held(held.salt, list(held.blocks), held.length, held.published, held.content)

    def find_prefix(self, sequence: int, tokens: Sequence[int], salt: int = 0) -> int:
        """Adds `sequence` with the longest prefix of `tokens` in whole blocks that has been published under the same
        `salt` (0 to 2^32 - 1), less the last token, which is to be run for its logits. Gives the tokens found."""
        if sequence in self._held:
            raise ValueError(f"sequence {sequence} is in the cache already")
        usable = max(0, len(tokens) - 1) // self.block_size * self.block_size
        blocks, content = self._allocator.match(list(tokens[:usable]), salt)
        length = len(blocks) * self.block_size
        self._held[sequence] = _Held(salt, blocks, length, len(blocks), content)
        return length

    def publish(self, sequence: int, tokens: Sequence[int]) -> None:
        """Tells that the cache holds the keys and values of `tokens`, all that `sequence` has run, so that
        `find_prefix` finds its full blocks."""
        held = self._find(sequence)
        size = self.block_size
        for block in range(held.published, min(held.length, len(tokens)) // size):
            content = list(tokens[block * size : (block + 1) * size])
            held.content = self._allocator.publish(held.blocks[block], held.content, content)
            held.published = block + 1

    def truncate(self, sequence: int, length: int) -> None:
        """Drops all but the first `length` tokens of a sequence, which may not be published ones."""
        held = self._find(sequence)
        if not held.published * self.block_size <= length <= held.length:
            raise ValueError(f"length is {length}; accepted: {held.published * self.block_size} to {held.length}")
        keep = self.blocks_for(length, self.block_size)
        self._allocator.release(held.blocks[keep:])
        del held.blocks[keep:]
        held.length = length

    def release(self, sequence: int) -> None:
        """Gives a sequence's blocks back."""
        self._allocator.release(self._find(sequence).blocks)
        del self._held[sequence]

    def swap_out(self, sequence: int) -> Saved:
        """Releases a sequence, its keys and values kept in main memory."""
        held = self._find(sequence)
        blocks = self._tensor(held.blocks, torch.int64)
        saved = Saved([tensor[:, blocks].cpu() for tensor in self._tensors], held)
        self.release(sequence)
        return saved

    def swap_in(self, sequence: int, saved: Saved) -> None:
        """Adds a sequence as `swap_out` saved it. MemoryError when the blocks don't suffice."""
        if sequence in self._held:
            raise ValueError(f"sequence {sequence} is in the cache already")
        blocks = self._allocator.take(len(saved.held.blocks))
        targets = self._tensor(blocks, torch.int64)
        for tensor, values in zip(self._tensors, saved.tensors):
            tensor[:, targets] = values.to(self.device)
        self._held[sequence] = _Held(saved.held.salt, blocks, saved.held.length, content=saved.held.salt)

    def _find(self, sequence: int) -> _Held:
        if sequence not in self._held:
            raise KeyError(f"sequence {sequence} is not in the cache; it holds {sorted(self._held)}")
        return self._held[sequence]

    def _tensor(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
