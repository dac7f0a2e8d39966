"""Gemma 2 (arXiv 2408.00118) and the text model of Gemma 3 (arXiv 2503.19786)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmcore.models.config import ModelConfig
from llmcore.models.families.base import (
    Family,
    HFConfig,
    Rule,
    attention_rules,
    decoder_config,
    decoder_json,
    decoder_rules,
    gated_mlp_rules,
    hf_rope,
    layer_types,
    same,
    window_layers,
)


def _shared(c: HFConfig, period: int) -> dict[str, Any]:
    """What both have in common; without `layer_types` every `period`-th layer sees everything."""
    c.check("hidden_activation", "gelu_pytorch_tanh")
    c.check("use_bidirectional_attention", False)
    window = c.get("sliding_window", 4096)
    windowed = window_layers(c, window)
    if c.get("layer_types") is None:
        windowed = tuple(i for i in range(c.need("num_hidden_layers")) if (i + 1) % period)
    bias = c.get("attention_bias", False)
    return decoder_config(
        c, activation="geglu", norm_unit_offset=True, norm_placement="sandwich", embedding_scale="sqrt_dim",
        tied_embeddings=c.get("tie_word_embeddings", True), head_dim=c.get("head_dim", 256), window=window,
        window_layers=windowed, attention_scale=c.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=c.get("attn_logit_softcapping"), logit_softcap=c.get("final_logit_softcapping"),
        qkv_bias=bias, attention_out_bias=bias,
    )  # fmt: skip


def _gemma2(c: HFConfig) -> ModelConfig:
    return ModelConfig(**_shared(c, 2), **c.rope())


def _gemma3(c: HFConfig) -> ModelConfig:
    local = c.rope(layer_type="sliding_attention")["rope_base"] if c.get("rope_parameters") else None
    everywhere = c.rope(1e6, layer_type="full_attention")
    local = c.get("rope_local_base_freq", 10000.0) if local is None else local
    return ModelConfig(
        **_shared(c, c.get("sliding_window_pattern", 6)), qk_norm=True, local_rope_base=local, **everywhere
    )


def _json(config: ModelConfig) -> dict[str, Any]:
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    values = decoder_json(
        config, hidden_activation="gelu_pytorch_tanh", sliding_window=config.window, layer_types=layer_types(config),
        query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        attn_logit_softcapping=config.attention_softcap, final_logit_softcapping=config.logit_softcap,
        attention_bias=config.qkv_bias,
    )  # fmt: skip
    del values["hidden_act"]
    return values


def _gemma3_json(config: ModelConfig) -> dict[str, Any]:
    rope = {
        "full_attention": hf_rope(config.rope_base, config.rope_fraction, config.rope_scaling),
        "sliding_attention": hf_rope(config.local_rope_base or config.rope_base, config.rope_fraction),
    }
    return _json(config) | {"rope_parameters": rope, "rope_local_base_freq": config.local_rope_base}


def _layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield same("attention_norm.weight", "input_layernorm.weight")
    yield same("attention_out_norm.weight", "post_attention_layernorm.weight")
    yield same("mlp_norm.weight", "pre_feedforward_layernorm.weight")
    yield same("mlp_out_norm.weight", "post_feedforward_layernorm.weight")
    yield from attention_rules(config)
    yield from gated_mlp_rules(config.ffn_dim)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    return decoder_rules(config, _layer)


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _gemma2, _json, _rules)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, _gemma3_json, _rules)
