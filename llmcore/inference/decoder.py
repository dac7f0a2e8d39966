"""A model's layers as one call into C++, for steps of few tokens, where Python would take as long as the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore import _C
from llmcore.inference.cache import PagedKVCache
from llmcore.layers import Attention, CacheStep, GatedMLP, QuantizedLinear
from llmcore.models import Transformer
from llmcore.models.transformer import Block
from llmcore.ops.linear import MAX_ROWS
from llmcore.ops.registry import has_kernel

_OPS = ("linear", "quantized_linear", "rms_norm", "qk_norm_rope_cache_write", "paged_attention", "swiglu")


class Decoder:
    """`model(tokens, cache=step).hidden`, bit for bit, for up to `MAX_TOKENS` tokens.

    It reads the weights where they lie, and those of `cache`: neither may be replaced while it is in use.
    """

    MAX_TOKENS = MAX_ROWS

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        if refusal := _refusal(model):
            raise ValueError(f"no decoder for this model: {refusal}")
        self.model, self.cache = model, cache
        self._kept: list[Tensor] = []  # what C++ points to and nobody else may hold
        c, attention, rope = model.config, model.blocks[0].attention, model.rope
        scale = attention.options["scale"]
        self._decoder = _C.Decoder(
            {
                "dtype": _name(model.dtype),
                "cache_dtype": _name(cache.k_caches[0].dtype),
                "dim": c.dim,
                "num_heads": c.num_heads,
                "num_kv_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "ffn_dim": c.ffn_dim,
                "rotary_dim": 0 if rope is None else rope.rotary_dim,
                "block_size": cache.block_size,
                "num_blocks": cache.num_blocks,
                "max_positions": c.max_positions if rope is not None else 2**31 - 1,
                "interleaved": rope is not None and rope.interleaved,
                "norm_eps": c.norm_eps,
                "scale": c.head_dim**-0.5 if scale is None else scale,
                "softcap": attention.options["softcap"] or 0.0,
                "activation": c.activation,
                "last_norm": self._at(model.norm.gain),
            }
        )
        for layer, block in enumerate(model.blocks):
            self._decoder.add_layer(self._layer(block, layer))

    def hidden(self, tokens: Tensor, step: CacheStep) -> Tensor:
        """Runs `tokens`, (total,), as `Transformer.forward` with a cache does. Gives (total, dim)."""
        x = self.model.embed(self.model.embed_tokens(tokens)).contiguous()
        out = torch.empty_like(x)
        self._decoder.step(
            len(tokens), len(step.kv_lens), x.data_ptr(), step.positions.data_ptr(), step.slot_mapping.data_ptr(),
            step.block_table.data_ptr(), step.block_table.shape[1], step.kv_lens.data_ptr(),
            0 if step.cu_seqlens_q is None else step.cu_seqlens_q.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def _layer(self, block: Block, layer: int) -> dict:
        attention, mlp, rope = block.attention, block.mlp, self.model.rope_of(layer)
        return {
            "attention_norm": self._at(block.attention_norm.gain),
            "mlp_norm": self._at(block.mlp_norm.gain),
            **{
                name: self._at(block.get_submodule(name).gain) if block.placement == "sandwich" else 0
                for name in ("attention_out_norm", "mlp_out_norm")
            },
            "qkv": self._matrix(attention.qkv),
            "out": self._matrix(attention.out),
            "gate_up": self._matrix(mlp.gate_up),
            "down": self._matrix(mlp.down),
            "q_norm": 0 if attention.q_norm is None else self._at(attention.q_norm.gain),
            "k_norm": 0 if attention.k_norm is None else self._at(attention.k_norm.gain),
            "cos": 0 if rope is None else self._at(rope.cos),
            "sin": 0 if rope is None else self._at(rope.sin),
            "window": attention.options["window"] or 0,
            "sinks": 0 if attention.sinks is None else self._at(attention.sinks.float()),
            "k_cache": self._at(self.cache.k_caches[layer]),
            "v_cache": self._at(self.cache.v_caches[layer]),
        }

    def _at(self, tensor: Tensor) -> int:
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; contiguous only")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, linear: torch.nn.Linear | QuantizedLinear) -> tuple[int, int, int, tuple]:
        bias = 0 if linear.bias is None else self._at(linear.bias)
        if isinstance(linear, QuantizedLinear):
            weights = [getattr(linear, f"packed{i}") for i in range(len(linear.parts))]
            parts = tuple((*part, self._at(weight)) for part, weight in zip(linear.parts, weights))
        else:
            parts = (("", linear.out_features, self._at(linear.weight)),)
        return linear.out_features, linear.in_features, bias, parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def can_decode(model: Transformer) -> bool:
    """Whether `Decoder` serves the model: on the CPU, and its layers are of the kind that C++ knows."""
    return _refusal(model) is None


def _refusal(model: Transformer) -> str | None:
    c = model.config
    if type(model) is not Transformer or not c.causal or c.position not in ("rope", "none"):
        return f"it is {type(model).__name__} with positions {c.position}"
    if model.device.type != "cpu" or not all(has_kernel(op, model) for op in _OPS):
        return f"it is {_name(model.dtype)} on {model.device}"
    if c.norm != "rms" or c.norm_placement not in ("pre", "sandwich"):
        return f"its norms are {c.norm_placement} and {c.norm}"
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        if type(attention) is not Attention or (c.qk_norm and c.qk_norm_scope != "head"):
            return f"its attention is {type(attention).__name__} with norms of {c.qk_norm_scope} heads"
        if type(mlp) is not GatedMLP or c.activation not in ("swiglu", "geglu"):
            return f"its feed-forward layers are {type(mlp).__name__} with {c.activation}"
        if any(p.dtype != model.dtype for p in block.parameters()):
            return "its weights have several dtypes"
    return None
