"""Layers whose weights stay quantised in memory; for inference only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.latent_attention import LatentAttention
from llmcore.layers.linear import Linear
from llmcore.layers.moe import MoE
from llmcore.layers.quantized_experts import QuantizedExperts
from llmcore.ops.quantized_linear import FORMATS, format_named, quantize

# What `quantize_model` is asked for -> what rows take whose length is no multiple of 256, and what the table of
# embeddings takes, which is also the output matrix of tied models and suffers most: llama.cpp's choices.
_INSTEAD = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_TABLE = {"q8_0": "q8_0"}
_TABLE_ELSE = "q6_k"


class QuantizedLinear(nn.Module):
    """A linear layer over a quantised weight, in place of `Linear`; for calls that ask for no gradient.

    The weight's rows may come in parts of different formats, one below the other, as the fused query, key and value
    rows of files that keep values in a finer format. Adjacent parts of one format are joined.

    Args:
        parts: (format, blocks) of each part, top to bottom; blocks (rows, bytes of a row) uint8 as in a GGUF file.
        bias: (all rows,), or None.

    Attributes:
        parts: (format, rows) of each part; its packed weight is the buffer `packed0`, `packed1`, ...
    """

    def __init__(self, parts: Sequence[tuple[str, Tensor]], bias: Tensor | None = None) -> None:
        super().__init__()
        sizes = {blocks.shape[1] // format_named(f).bytes * FORMATS[f].block for f, blocks in parts}
        if len(sizes) != 1:
            raise ValueError(f"the parts' rows have {sorted(sizes)} weights; accepted: all the same number")
        self.in_features = sizes.pop()
        self.parts: list[tuple[str, int]] = []
        for format, same in groupby(parts, key=lambda part: part[0]):
            blocks = [blocks for _, blocks in same]
            joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            self.register_buffer(f"packed{len(self.parts)}", ops.pack_quantized(joined, format))
            self.parts.append((format, len(joined)))
        self.out_features = sum(rows for _, rows in self.parts)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted: ({self.out_features},)")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Gives (..., out_features)."""
        if len(self.parts) == 1:
            return ops.quantized_linear(x, self.packed0, self.parts[0][0], self.out_features, self.bias)
        y, begin = x.new_empty(*x.shape[:-1], self.out_features), 0
        for i, (format, rows) in enumerate(self.parts):
            bias = None if self.bias is None else self.bias[begin : begin + rows]
            ops.quantized_linear_(y[..., begin : begin + rows], x, getattr(self, f"packed{i}"), format, bias)
            begin += rows
        return y

    def extra_repr(self) -> str:
        parts = ", ".join(f"{format} x {rows}" for format, rows in self.parts)
        return f"in_features={self.in_features}, rows=[{parts}], bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """A table of embeddings that stays quantised, in place of `nn.Embedding`; of a tied model also the output matrix.

    Args:
        format, blocks: the table, blocks (num_embeddings, bytes of a row) uint8 as in a GGUF file.
        dtype: of what it gives; `.to(dtype)` changes it.
    """

    def __init__(self, format: str, blocks: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        f = format_named(format)
        self.format, self.num_embeddings = format, len(blocks)
        self.embedding_dim = blocks.shape[1] // f.bytes * f.block
        self.register_buffer("packed", ops.pack_quantized(blocks, format))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=blocks.device), persistent=False)

    @property
    def num_weights(self) -> int:
        return self.num_embeddings * self.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers. Gives (*ids.shape, embedding_dim)."""
        return ops.quantized_embedding(
            ids, self.packed, self.format, self.num_embeddings, self.embedding_dim, self.dtype
        )

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (..., embedding_dim) -> its products with all rows, (..., num_embeddings)."""
        return ops.quantized_linear(hidden, self.packed, self.format, self.num_embeddings)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


def quantize_model(model: nn.Module, format: str) -> nn.Module:
    """Quantises the weights of `model` in place, and returns it; from then on it is for inference only.

    Every `llmcore.layers.Linear`, the experts of every `MoE`, the output matrix (`lm_head`) and the table of embeddings
    (`embed_tokens`) become quantised. Where a format's blocks of 256 don't fit a layer's rows, q4_k gives way to q5_0,
    q5_k to q5_1 and q6_k to q8_0. The table and the output matrix take q6_k, which falls back likewise, but q8_0 with
    q8_0. Rows that are no multiple of 32 stay as they are; so do norms, biases, positions, routers, and what latent
    attention absorbs (`kv_b`).

    Args:
        format: a name of `llmcore.ops.quantized_linear.FORMATS`.
    """
    format_named(format)
    table = _TABLE.get(format, _TABLE_ELSE)
    for parent in list(model.modules()):
        if isinstance(parent, MoE):
            _quantize_experts(parent, format)
        for name, layer in list(parent.named_children()):
            if isinstance(parent, LatentAttention) and name == "kv_b":
                continue
            if isinstance(layer, Linear) or (isinstance(layer, nn.Linear) and name == "lm_head"):
                wanted = table if name == "lm_head" else format
                if (chosen := _format_for(wanted, layer.in_features)) is not None:
                    blocks = quantize(layer.weight, chosen)
                    setattr(parent, name, QuantizedLinear([(chosen, blocks)], layer.bias))
            elif isinstance(layer, nn.Embedding) and name == "embed_tokens":
                if (chosen := _format_for(table, layer.embedding_dim)) is not None:
                    blocks = quantize(layer.weight, chosen)
                    setattr(parent, name, QuantizedEmbedding(chosen, blocks, layer.weight.dtype))
    return model


def _quantize_experts(layer: MoE, format: str) -> None:
    for name in ("gate_up", "down"):
        weight = getattr(layer, name)
        if isinstance(weight, nn.Parameter) and (chosen := _format_for(format, weight.shape[-1])) is not None:
            blocks = torch.stack([quantize(expert, chosen) for expert in weight])
            layer.set_quantized(name, QuantizedExperts([(chosen, blocks)]))


def _format_for(format: str, k: int) -> str | None:
    """`format`, or what it gives way to where rows have k weights."""
    if k % FORMATS[format].block:
        format = _INSTEAD.get(format, format)
    return None if k % FORMATS[format].block else format
