"""Generation by a decoder that attends to an encoder: the sources are encoded once, then it is `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.inference.generate import generate
from llmcore.layers import CacheStep, Memory
from llmcore.models import EncoderDecoder, TransformerOutput
from llmcore.models.transformer import HasTable


class ConditionedDecoder(HasTable, nn.Module):
    """The decoder of `model` over sources encoded beforehand, with the interface of `Transformer` over a cache.
    Sequence i of the cache attends to source i.

    Args:
        sources: token ids of each source, at least one.
    """

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if empty := [index for index, source in enumerate(sources) if len(source) == 0]:
            raise ValueError(f"source {empty[0]} is empty; accepted: at least one token")
        self.model, self.config, device = model, model.config, model.device
        lengths = [len(source) for source in sources]
        packed = torch.tensor([int(t) for source in sources for t in source], dtype=torch.int64, device=device)
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        encoded = model.encode(packed, cu_seqlens=starts, max_seqlen=max(lengths, default=0))
        self._memory = model.memory(encoded, starts)

    @property
    def embed_tokens(self) -> nn.Module:
        return self.model.embed_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def forward(self, tokens: Tensor, *, cache: CacheStep) -> TransformerOutput:
        """tokens: packed (total,), the new ones of the cache's running sequences."""
        counts = cache.kv_lens.new_ones(len(cache.sequences))
        if cache.cu_seqlens_q is not None:
            counts = cache.cu_seqlens_q.diff()
        sources = len(self._memory.cu_seqlens) - 1
        per_source = counts.new_zeros(sources + 1)  # a source whose sequence has ended has no queries
        per_source[torch.tensor(cache.sequences, device=counts.device) + 1] = counts
        memory = Memory(self._memory.keys_values, self._memory.cu_seqlens, per_source.cumsum(0).int())
        return TransformerOutput(self.model.decode(tokens, memory, cache=cache), None, None)


@torch.inference_mode()
def generate_seq2seq(
    model: EncoderDecoder, sources: Sequence[Sequence[int]], *, start_id: int = 0, **options: Any
) -> list[list[int]]:
    """What the decoder makes of each source. The encoder runs once, and so do the layers' projections of its output to
    keys and values.

    Args:
        sources: token ids, at least one each; a (batch, seq) tensor will do.
        start_id: the token that the decoder begins with (T5: that of padding, 0).
        options: of `generate`: max_tokens, temperature, stop_ids and so on.

    Returns:
        The new tokens of each source, without the first, with the stop token that ended them.
    """
    was_training = model.training
    model.eval()
    try:
        decoder = ConditionedDecoder(model, sources)
        return generate(decoder, [[start_id]] * len(sources), **options)
    finally:
        model.train(was_training)
