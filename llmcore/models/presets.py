"""Ready-made configurations in the style of known model families.

Each takes a size and any field of `ModelConfig` to override: `llama("tiny", vocab_size=1000, num_kv_heads=1)`. Sizes
that a family has published carry its numbers; "tiny", "micro" and "mini" are for tests and small machines.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llmcore.models.config import ModelConfig

_GPT2 = {  # Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2
    "tiny": {"dim": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512, "max_positions": 256},
    "mini": {"dim": 256, "num_layers": 6, "num_heads": 8, "vocab_size": 4096, "max_positions": 512},
    "small": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "medium": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "large": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "xl": {"dim": 1600, "num_layers": 48, "num_heads": 25},
}

_LLAMA = {
    "tiny": {
        "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128, "vocab_size": 512,
        "max_positions": 256,
    },
    "micro": {
        "dim": 192, "num_layers": 6, "num_heads": 6, "num_kv_heads": 3, "ffn_dim": 512, "vocab_size": 4096,
        "max_positions": 512,
    },
    "mini": {
        "dim": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 704, "vocab_size": 4096,
        "max_positions": 512,
    },
    "135m": {  # SmolLM2-135M (arXiv 2502.02737)
        "dim": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "ffn_dim": 1536, "vocab_size": 49152,
        "max_positions": 8192, "rope_base": 1e5,
    },
    "7b": {  # Llama 2 7B (arXiv 2307.09288)
        "dim": 4096, "num_layers": 32, "num_heads": 32, "ffn_dim": 11008, "vocab_size": 32000,
        "max_positions": 4096, "tied_embeddings": False,
    },
    "8b": {  # Llama 3 8B (arXiv 2407.21783)
        "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 14336, "vocab_size": 128256,
        "max_positions": 8192, "rope_base": 5e5, "tied_embeddings": False,
    },
}  # fmt: skip

_LLAMA_MOE = {
    "tiny": _LLAMA["tiny"] | {
        "num_layers": 3,
        "moe": {"num_experts": 8, "top_k": 2, "ffn_dim": 48, "shared_experts": 1, "first_dense_layers": 1},
    },
    "mini": _LLAMA["mini"] | {
        "moe": {"num_experts": 16, "top_k": 2, "ffn_dim": 256, "shared_experts": 1, "first_dense_layers": 1},
    },
    "8x7b": {  # Mixtral 8x7B (arXiv 2401.04088)
        "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 14336, "vocab_size": 32000,
        "max_positions": 32768, "rope_base": 1e6, "tied_embeddings": False,
        "moe": {"num_experts": 8, "top_k": 2, "ffn_dim": 14336},
    },
}  # fmt: skip

_ATTENTION_IS_ALL_YOU_NEED = {  # arXiv 1706.03762, table 3
    "tiny": {
        "dim": 64, "num_layers": 2, "encoder_layers": 2, "num_heads": 4, "ffn_dim": 128, "vocab_size": 512,
        "dropout": 0.0,
    },
    "base": {"dim": 512, "num_layers": 6, "encoder_layers": 6, "num_heads": 8, "ffn_dim": 2048, "dropout": 0.1},
    "big": {"dim": 1024, "num_layers": 6, "encoder_layers": 6, "num_heads": 16, "ffn_dim": 4096, "dropout": 0.3},
}  # fmt: skip


def _build(family: str, sizes: dict[str, dict[str, Any]], size: str, *layers: dict[str, Any]) -> ModelConfig:
    if size not in sizes:
        raise ValueError(f"{family} has no size {size!r}; accepted: {', '.join(map(repr, sizes))}")
    base, overrides = layers
    values = base | sizes[size] | overrides
    if isinstance(values.get("moe"), dict):
        values["moe"] = sizes[size].get("moe", {}) | values["moe"]
    return ModelConfig.from_dict(values)


def gpt2(size: str = "small", **overrides: Any) -> ModelConfig:
    """GPT-2 style: layer norm, learned positions, GELU, biases everywhere, tied embeddings."""
    base = {
        "vocab_size": 50257, "max_positions": 1024, "position": "learned", "activation": "gelu", "norm": "layer",
        "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True,
    }  # fmt: skip
    return _build("gpt2", _GPT2, size, base, overrides)


def llama(size: str = "mini", **overrides: Any) -> ModelConfig:
    """Llama style (arXiv 2302.13971): RMS norm, rotary positions, SwiGLU, grouped-query attention, no biases."""
    return _build("llama", _LLAMA, size, {}, overrides)


def llama_moe(size: str = "mini", **overrides: Any) -> ModelConfig:
    """Llama style with a mixture of experts; `moe` overrides single keys of the size's `moe`."""
    return _build("llama_moe", _LLAMA_MOE, size, {}, overrides)


def llama_dyt(size: str = "mini", **overrides: Any) -> ModelConfig:
    """Llama style without a norm: dynamic tanh stands in every norm's place (arXiv 2503.10622).

    Nothing brings a small signal back to size here. So the embeddings are scaled, as in the paper, and weights start
    with standard deviation 1 / sqrt(dim) unless `init_std` is given: with 0.02, models of a small dim don't learn.
    """
    config = _build("llama_dyt", _LLAMA, size, {"norm": "dyt", "embedding_scale": "learned"}, overrides)
    return config if "init_std" in overrides else dataclasses.replace(config, init_std=config.dim**-0.5)


def attention_is_all_you_need(size: str = "base", **overrides: Any) -> ModelConfig:
    """The encoder-decoder of "Attention Is All You Need" (arXiv 1706.03762): norms behind the residual additions,
    sinusoidal positions, ReLU, one matrix for both token tables and the output, its rows scaled by sqrt(dim) where they
    are looked up and small accordingly at the start. The attention's projections have no biases, as the paper writes
    them. For `EncoderDecoder`."""
    base = {
        "vocab_size": 37000, "position": "sinusoidal", "activation": "relu", "norm": "layer", "norm_placement": "post",
        "mlp_bias": True, "embedding_scale": "sqrt_dim",
    }  # fmt: skip
    config = _build("attention_is_all_you_need", _ATTENTION_IS_ALL_YOU_NEED, size, base, overrides)
    return config if "init_std" in overrides else dataclasses.replace(config, init_std=config.dim**-0.5)


# Those of decoders.
PRESETS = {"gpt2": gpt2, "llama": llama, "llama_moe": llama_moe, "llama_dyt": llama_dyt}
