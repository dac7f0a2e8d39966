"""The paged cache against a simple model of it: every sequence a list of tokens of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmcore import _C
from llmcore.inference import PagedKVCache
from llmcore.models import ModelConfig

CONFIG = ModelConfig(vocab_size=8, dim=8, num_layers=2, num_heads=1, num_kv_heads=1)
BLOCKS, SIZE = 9, 3


class CacheMachine(RuleBasedStateMachine):
    """Each token's key is its own value; what a sequence reads back must be what it wrote."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.int8]))
    def make(self, dtype):
        self.cache = PagedKVCache(CONFIG, BLOCKS, block_size=SIZE, dtype=dtype)
        self.tokens: dict[int, list[int]] = {}
        self.published: dict[int, int] = {}
        self.saved: dict[int, tuple[list[int], object]] = {}
        self.next = 0

    def new(self) -> int:
        self.next += 1
        return self.next

    def write(self, step, tokens):
        values = torch.tensor(tokens, dtype=torch.float32)
        for layer, (k, v) in enumerate(zip(self.cache.k_caches, self.cache.v_caches)):
            for cache, scales in ((k, self.cache.k_scales), (v, self.cache.v_scales)):
                rows = cache.view(BLOCKS * SIZE, -1)
                rows[step.slot_mapping] = values[:, None].to(cache.dtype).expand(-1, rows.shape[1])
                if scales is not None:
                    scales[layer].view(-1)[step.slot_mapping] = values + layer

    @rule(data=st.data(), count=st.integers(1, 7))
    def extend(self, data, count):
        """One or two sequences at a time, old or new."""
        choices = [*self.tokens, self.new()]
        sequences = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=2, unique=True))
        counts = [count, 1][: len(sequences)]
        needed = sum(self.cache.blocks_needed(s, c) for s, c in zip(sequences, counts))
        before = {s: self.cache.length(s) for s in sequences}
        if needed > self.cache.num_free_blocks:
            with pytest.raises(MemoryError):
                self.cache.extend(sequences, counts)
            assert before == {s: self.cache.length(s) for s in sequences}
            return
        tokens = [data.draw(st.lists(st.integers(0, 3), min_size=c, max_size=c)) for c in counts]
        step = self.cache.extend(sequences, counts)
        self.write(step, [t for new in tokens for t in new])
        for s, new in zip(sequences, tokens):
            self.tokens.setdefault(s, []).extend(new)
            self.published.setdefault(s, 0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        parent, child = data.draw(st.sampled_from(sorted(self.tokens))), self.new()
        self.cache.fork(parent, child)
        self.tokens[child], self.published[child] = list(self.tokens[parent]), self.published[parent]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.release(sequence)
        del self.tokens[sequence], self.published[sequence]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def publish(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.publish(sequence, self.tokens[sequence])
        self.published[sequence] = len(self.tokens[sequence]) // SIZE * SIZE

    @rule(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=14))
    def find_prefix(self, tokens):
        sequence = self.new()
        found = self.cache.find_prefix(sequence, tokens)
        assert found % SIZE == 0
        assert found < len(tokens)
        self.tokens[sequence], self.published[sequence] = tokens[:found], found

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        length = data.draw(st.integers(self.published[sequence], len(self.tokens[sequence])))
        self.cache.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def swap_out(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.saved[sequence] = self.tokens.pop(sequence), self.cache.swap_out(sequence)
        del self.published[sequence]

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def swap_in(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.saved)))
        tokens, saved = self.saved[sequence]
        if -(-len(tokens) // SIZE) > self.cache.num_free_blocks:
            with pytest.raises(MemoryError):
                self.cache.swap_in(sequence, saved)
            return
        self.cache.swap_in(sequence, saved)
        self.tokens[sequence], self.published[sequence] = tokens, 0
        del self.saved[sequence]

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        for sequence, tokens in getattr(self, "tokens", {}).items():
            assert self.cache.length(sequence) == len(tokens)
            blocks = self.cache._held[sequence].blocks
            for layer in range(CONFIG.num_layers):
                for cache, scales in (
                    (self.cache.k_caches, self.cache.k_scales), (self.cache.v_caches, self.cache.v_scales)
                ):  # fmt: skip
                    assert cache[layer][blocks].flatten(0, 1)[: len(tokens), 0, 0].tolist() == tokens
                    if scales is not None:
                        values = scales[layer][blocks].flatten(0, 1)[: len(tokens), 0].tolist()
                        assert values == [t + layer for t in tokens]

    @invariant()
    def every_block_is_held_or_free(self):
        if hasattr(self, "cache"):
            held = {b for s in self.tokens for b in self.cache._held[s].blocks}
            assert self.cache.num_free_blocks == BLOCKS - len(held)

    def teardown(self):
        for sequence in list(getattr(self, "tokens", ())):
            self.cache.release(sequence)
        if hasattr(self, "cache"):
            assert self.cache.num_free_blocks == BLOCKS


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_prefix_idle_longest_goes_first():
    cache = PagedKVCache(CONFIG, 4, block_size=2)
    for sequence, token in ((1, 5), (2, 6), (3, 7)):
        cache.extend([sequence], [2])
        cache.publish(sequence, [token, token])
    for sequence in (2, 1, 3):
        cache.release(sequence)
    assert cache.num_free_blocks == 4
    cache.extend([4], [4])  # the free block, and that of sequence 2
    found = [cache.find_prefix(10 + t, [t, t, 0]) for t in (5, 6, 7)]
    assert found == [2, 0, 2]


def test_salts_keep_prefixes_apart():
    cache = PagedKVCache(CONFIG, 4, block_size=2)
    assert cache.find_prefix(1, [5, 5, 5], salt=3) == 0
    cache.extend([1], [3])
    cache.publish(1, [5, 5, 5])
    assert cache.find_prefix(2, [5, 5, 5]) == 0
    assert cache.find_prefix(3, [5, 5, 5], salt=3) == 2
    saved = cache.swap_out(1)
    cache.release(3)
    cache.extend([9], [8])  # nothing of it is left
    cache.release(9)
    cache.swap_in(1, saved)
    cache.publish(1, [5, 5, 5])
    assert cache.find_prefix(4, [5, 5, 5]) == 0
    assert cache.find_prefix(5, [5, 5, 5], salt=3) == 2


def test_the_same_tokens_after_other_tokens_are_another_prefix():
    cache = PagedKVCache(CONFIG, 6, block_size=2)
    cache.extend([1], [4])
    cache.publish(1, [1, 1, 2, 2])
    assert cache.find_prefix(2, [3, 3, 2, 2, 0]) == 0
    assert cache.find_prefix(3, [2, 2, 0]) == 0
    assert cache.find_prefix(4, [1, 1, 2, 2, 0]) == 4


def test_errors():
    allocator = _C.BlockAllocator(3, 2)
    with pytest.raises(MemoryError):
        allocator.take(4)
    assert allocator.num_free == 3
    (block,) = allocator.take(1)
    with pytest.raises(ValueError, match="a block of 1 tokens; accepted: full ones of 2"):
        allocator.publish(block, 0, [1])
    with pytest.raises(ValueError, match=f"block {(block + 1) % 3} is nobody's"):
        allocator.release([(block + 1) % 3])
    with pytest.raises(IndexError, match="block 3; accepted: 0 to 2"):
        allocator.share([3])
    with pytest.raises(ValueError, match="num_blocks is 0, block_size 1; accepted: 1 or more each"):
        _C.BlockAllocator(0, 1)
    cache = PagedKVCache(CONFIG, 4, block_size=2)
    cache.extend([1], [3])
    cache.publish(1, [5, 5, 5])
    with pytest.raises(ValueError, match="length is 1; accepted: 2 to 3"):
        cache.truncate(1, 1)
    with pytest.raises(ValueError, match="sequence 1 is in the cache already"):
        cache.fork(1, 1)
    with pytest.raises(ValueError, match="sequence 1 is in the cache already"):
        cache.find_prefix(1, [1, 2])
