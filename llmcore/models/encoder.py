"""Encoders: every token sees its whole sequence (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers import Linear, plain
from llmcore.models.config import ModelConfig
from llmcore.models.transformer import Transformer, init_weights, make_model_norm


class EncoderOutput(NamedTuple):
    """hidden: (batch, seq, dim) or (total, dim), zeros for padding; pooled: (sequences, dim), or None without a pooler;
    aux_loss, expert_load: as of `TransformerOutput`."""

    hidden: Tensor
    pooled: Tensor | None
    aux_loss: Tensor | None
    expert_load: Tensor | None


class TransformHead(nn.Module):
    """What BERT has between hidden states and the output matrix, and the bias behind that."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.dense = Linear(config.dim, config.dim)
        self.norm = make_model_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: (..., dim); weight: the output matrix. Gives the logits, (..., vocab_size)."""
        return ops.linear(self.norm(plain(self.activation, self.dense(hidden))), weight, self.bias)


class Encoder(Transformer):
    """An encoder over token ids, whose configuration is not causal: `model(tokens, mask=mask)` gives the hidden states
    of the tokens and, with `config.pooler`, one vector per sequence."""

    def __init__(self, config: ModelConfig) -> None:
        if config.causal:
            raise ValueError("causal is True; accepted: False in an encoder")
        super().__init__(config)
        self.pooler = Linear(config.dim, config.dim) if config.pooler else None
        self.mlm_head = TransformHead(config) if config.head == "mlm" else None
        for part in (self.pooler, self.mlm_head):
            if part is not None:
                init_weights(part, config)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, **where) -> EncoderOutput:
        """Arguments as those of `Transformer.forward`, but for the cache that an encoder has no use for."""
        out = super().forward(tokens, mask=mask, **where)
        pooled = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(self._first(out.hidden, mask, where.get("cu_seqlens"))))
        return EncoderOutput(out.hidden, pooled, out.aux_loss, out.expert_load)

    def _first(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """The hidden state of each sequence's first token."""
        if cu_seqlens is not None:
            return hidden[cu_seqlens[:-1].long()]
        if mask is None or mask.ndim == 1:
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., dim) -> logits (..., vocab_size) of what stands in each token's place."""
        if self.config.head == "none":
            raise ValueError("the model has no head; accepted by logits: head 'linear' or 'mlm'")
        if self.mlm_head is None:
            return super().logits(hidden)
        return self.mlm_head(hidden, self.lm_head_weight)


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's packed hidden states, (total, dim) -> (sequences, dim); 0 of an empty sequence."""
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(lengths, output_size=len(hidden))
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    sums = sums.index_add(0, owner, hidden.to(sums.dtype))
    return (sums / lengths.clamp(min=1)[:, None]).to(hidden.dtype)
