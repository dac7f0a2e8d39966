"""One decode step of a batch as a CUDA graph: hundreds of kernel launches for the price of one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcore.inference.cache import PagedKVCache
from llmcore.layers import CacheStep
from llmcore.models import Transformer
from llmcore.ops.attention import CUDA_HEAD_DIM
from llmcore.ops.registry import has_kernel

# What a captured step must find a kernel for: references look at their inputs on the host.
_STEP_OPS = ("paged_attention", "qk_norm_rope_cache_write")
_MOE_OPS = ("moe_route", "grouped_glu", "grouped_gemm", "moe_combine")


def can_capture(model: Transformer) -> bool:
    """Whether a decode step of `model` can be captured: on a GPU, by kernels that serve its dtype and head size. What
    is quantised, or has an encoder or a position bias, can't."""
    c = model.config
    if model.device.type != "cuda" or c.head_dim > CUDA_HEAD_DIM or model.is_quantized:
        return False
    if c.encoder_layers or c.position == "relative":
        return False
    ops = _STEP_OPS + (_MOE_OPS if model.config.moe is not None else ())
    return all(has_kernel(op, model) for op in ops)  # whose dtype and device are its hidden states'


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """To warm up and to capture on. torch's own stream for captures is on the device of the process's first one; and
    for every stream that cuBLAS has seen it keeps a workspace, so there are no more of them than needed."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class DecodeGraph:
    """One new token for each of up to `batch_size` sequences.

    What changes from step to step lies in one tensor and comes from the host in one copy. The rows that fewer sequences
    leave write to no slot and see no key. The first call captures the step; on the CPU, which has no graphs, each call
    runs it.

    Args:
        cache: of the sequences; its tensors stay where they are.
        max_blocks: the most cache blocks that a sequence will have.
        pool: `torch.cuda.graph_pool_handle()`: memory to share with graphs that are not replayed at the same time.
    """

    def __init__(
        self, model: Transformer, cache: PagedKVCache, batch_size: int, max_blocks: int, pool: tuple | None = None
    ) -> None:
        self.model, self.cache, self.batch_size, self.max_blocks = model, cache, batch_size, max_blocks
        # a row for each sequence: token, slot, position, keys, blocks
        self._inputs = torch.zeros(batch_size, 4 + max_blocks, dtype=torch.int64, device=cache.device)
        self._pool, self._graph, self._logits = pool, None, None

    @torch.no_grad()
    def logits(self, sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Extends each of `sequences` in the cache by its token. Gives the logits after it, (sequences, vocab), which
        stand until the next call."""
        keys = max(self.cache.lengths.get(s, 0) for s in sequences) + 1
        if len(sequences) > self.batch_size or keys > self.max_blocks * self.cache.block_size:
            raise ValueError(
                f"{len(sequences)} sequences of up to {keys} tokens; this graph is for {self.batch_size} of up to "
                f"{self.max_blocks * self.cache.block_size}"
            )
        room = self.cache.make_room(sequences, [1] * len(sequences))
        rows = [
            [token, slot, position, length, *blocks, *[0] * (self.max_blocks - len(blocks))]
            for token, slot, position, length, blocks in zip(tokens, *room)
        ]
        idle = [0, -1, 0, 0] + [0] * self.max_blocks
        self._inputs.copy_(torch.tensor(rows + [idle] * (self.batch_size - len(rows))))
        if not self._inputs.is_cuda:
            return self._run()[: len(rows)]
        with torch.cuda.device(self._inputs.device):
            if self._graph is None:
                self._capture()
            self._graph.replay()
        return self._logits[: len(rows)]

    def _run(self) -> Tensor:
        tokens, slots, positions, lengths = self._inputs[:, :4].unbind(1)
        step = CacheStep(
            self.cache.k_caches,
            self.cache.v_caches,
            slot_mapping=slots.contiguous(),
            block_table=self._inputs[:, 4:].int(),
            kv_lens=lengths.int(),
            positions=positions.contiguous(),
        )
        return self.model.logits(self.model(tokens.contiguous(), cache=step).hidden)

    def _capture(self) -> None:
        # Once without a graph, on a stream beside: libraries allocate and choose on their first call. It writes to the
        # cache what the replay will write again.
        beside, capturing = _streams(self._inputs.device)
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=capturing):
            self._logits = self._run()
        self._graph = graph
