"""Encoder and decoder ("Attention Is All You Need", arXiv 1706.03762; T5, arXiv 1910.10683)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers import CacheStep, Memory
from llmcore.models.config import ModelConfig
from llmcore.models.padding import Packing
from llmcore.models.transformer import HasTable, Stack, init_weights


class EncoderDecoderOutput(NamedTuple):
    """hidden: the decoder's, shaped as its tokens, before the output matrix; encoded: the encoder's, shaped as its."""

    hidden: Tensor
    encoded: Tensor


class EncoderDecoder(HasTable, nn.Module):
    """A decoder whose layers attend to the output of an encoder: `model(source, target)` gives hidden states of the
    target's tokens, `model.logits(hidden)` logits. Both share one token table. `encode` and `decode` are its halves.
    Initial weights: `init_weights`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.encoder_layers:
            raise ValueError("encoder_layers is 0; accepted: 1 or more in an encoder-decoder")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.encoder, self.decoder = Stack(config.encoder), Stack(config)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        init_weights(self, config)

    @property
    def lm_head_weight(self) -> Tensor:
        """The output matrix, (vocab_size, dim)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, source: Tensor, target: Tensor, *, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> EncoderDecoderOutput:
        """Hidden states of the target's tokens, each of which sees the whole source and the target up to itself.

        Args:
            source, target: integers below vocab_size, (batch, seq) each; their lengths may differ.
            source_mask, target_mask: of padded batches, as in `Transformer.forward`. Padding is not computed on.

        Raises as `Transformer.forward`, and ValueError for a target of another number of rows than the source.
        """
        if source.ndim != 2 or target.ndim != 2 or len(source) != len(target):
            shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
            raise ValueError(f"source and target have shapes {shapes}; accepted: (batch, seq) of the same batch")
        if source_mask is None and target_mask is None:
            encoded = self.encode(source)
            return EncoderDecoderOutput(self.decode(target, self.memory(encoded)), encoded)
        sides = []
        for tokens, mask in ((source, source_mask), (target, target_mask)):
            full = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            sides.append(Packing.of(full, tuple(tokens.shape)))
        ours, theirs = sides
        encoded = self.encode(ours.pack(source), cu_seqlens=ours.cu_seqlens, max_seqlen=ours.max_seqlen)
        memory = self.memory(encoded, ours.cu_seqlens, theirs.cu_seqlens)
        hidden = self.decode(
            theirs.pack(target), memory, cu_seqlens=theirs.cu_seqlens, max_seqlen=theirs.max_seqlen
        )  # fmt: skip
        return EncoderDecoderOutput(theirs.unpack(hidden), ours.unpack(encoded))

    def encode(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """tokens: (batch, seq), or packed (total,) with cu_seqlens. Gives the encoder's hidden states, (..., dim)."""
        positions = self.encoder.positions_of(tokens, None, cu_seqlens, max_seqlen)
        return self.encoder.run(self.embed_tokens(tokens), positions=positions, cu_seqlens=cu_seqlens).hidden

    def memory(self, encoded: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_q: Tensor | None = None) -> Memory:
        """The keys and values that every layer of the decoder makes of `encoded`, which stay while it decodes.

        Args:
            encoded: (batch, seq, dim); or (total, dim) with cu_seqlens, where each sequence begins.
            cu_seqlens_q: where each sequence's tokens of the decoder begin, when they are packed.
        """
        keys_values = [block.cross_attention.keys_values(encoded) for block in self.decoder.blocks]
        return Memory(keys_values, cu_seqlens, cu_seqlens_q)

    def decode(
        self,
        tokens: Tensor,
        memory: Memory,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Hidden states of the decoder's tokens, (..., dim); arguments as those of `Transformer.forward`."""
        positions = self.decoder.positions_of(tokens, None, cu_seqlens, max_seqlen, cache)
        x = self.embed_tokens(tokens)
        return self.decoder.run(x, positions=positions, cu_seqlens=cu_seqlens, cache=cache, memory=memory).hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., dim) -> logits (..., vocab_size), in hidden's dtype."""
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        logits = ops.linear(hidden, self.lm_head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def num_parameters(self) -> int:
        """How many parameters there are, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())
