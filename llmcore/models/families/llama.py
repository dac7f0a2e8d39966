"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what differs from it by a setting: Mistral
(arXiv 2310.06825) with a sliding window, SmolLM3 with layers that don't rotate, Qwen2 (arXiv 2407.10671) with biases
on the projections of queries, keys and values, Qwen3 (arXiv 2505.09388) with norms on queries and keys, GLM-4
(arXiv 2406.12793) which rotates neighbouring features of half a head."""

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
    layer_types,
    pre_norm_rules,
    same,
    window_layers,
)


def layer_rules(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    yield from gated_mlp_rules(config.ffn_dim, config.mlp_bias)


def rules(config: ModelConfig) -> Iterator[Rule]:
    return decoder_rules(config, layer_rules)


def _llama(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    bias = c.get("attention_bias", False)
    return ModelConfig(
        **decoder_config(c, qkv_bias=bias, attention_out_bias=bias, mlp_bias=c.get("mlp_bias", False), **c.rope())
    )


def _llama_json(config: ModelConfig) -> dict[str, Any]:
    return decoder_json(config, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _mistral(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    return ModelConfig(**decoder_config(c, window=c.get("sliding_window"), **c.rope()))


def _mistral_json(config: ModelConfig) -> dict[str, Any]:
    return decoder_json(config, sliding_window=config.window)


def _smollm3(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    c.check("use_sliding_window", False)
    bias, layers = c.get("attention_bias", False), c.need("num_hidden_layers")
    every = c.get("no_rope_layer_interval", 4)
    rotates = c.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if len(rotates) != layers:
        raise ValueError(f"no_rope_layers has {len(rotates)} entries; accepted: {layers}, one for each layer")
    return ModelConfig(
        **decoder_config(
            c, qkv_bias=bias, attention_out_bias=bias, mlp_bias=c.get("mlp_bias", False),
            no_rope_layers=tuple(i for i, rotated in enumerate(rotates) if not rotated), **c.rope(2e6),
        )
    )  # fmt: skip


def _smollm3_json(config: ModelConfig) -> dict[str, Any]:
    rotates = [int(i not in config.no_rope_layers) for i in range(config.num_layers)]
    return _llama_json(config) | {
        "no_rope_layers": rotates, "use_sliding_window": False, "layer_types": ["full_attention"] * config.num_layers,
    }  # fmt: skip


def _qwen_window(c: HFConfig) -> dict[str, Any]:
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    if window is None:
        return {"window": None}
    if c.get("layer_types") is not None:
        return {"window": window, "window_layers": window_layers(c, window)}
    layers, first = c.need("num_hidden_layers"), c.get("max_window_layers", 28)
    return {"window": window, "window_layers": tuple(range(first, layers)) if first else None}


def _qwen_json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    windowed = [i for i in range(config.num_layers) if config.layer_window(i) is not None]
    return decoder_json(
        config, use_sliding_window=config.window is not None, sliding_window=config.window,
        max_window_layers=min(windowed, default=config.num_layers), layer_types=layer_types(config), **more,
    )  # fmt: skip


def _qwen2(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    return ModelConfig(**decoder_config(c, qkv_bias=True, **_qwen_window(c), **c.rope()))


def _qwen3(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    bias = c.get("attention_bias", False)
    return ModelConfig(
        **decoder_config(c, qk_norm=True, qkv_bias=bias, attention_out_bias=bias, **_qwen_window(c), **c.rope())
    )


def _qwen3_json(config: ModelConfig) -> dict[str, Any]:
    return _qwen_json(config, attention_bias=config.qkv_bias)


def _glm(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    rope = c.rope()
    if "partial_rotary_factor" not in (c.get("rope_parameters") or {}):
        rope["rope_fraction"] = c.get("partial_rotary_factor", 0.5)
    bias = c.get("attention_bias", False)
    return ModelConfig(**decoder_config(c, qkv_bias=bias, rope_interleaved=True, **rope))


def _glm_json(config: ModelConfig) -> dict[str, Any]:
    values = decoder_json(config, attention_bias=config.qkv_bias, partial_rotary_factor=config.rope_fraction)
    values["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    return values


def _glm_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    yield same("mlp.gate_up.weight", "mlp.gate_up_proj.weight")
    yield same("mlp.down.weight", "mlp.down_proj.weight")


LLAMA = Family("llama", "LlamaForCausalLM", _llama, _llama_json, rules)
MISTRAL = Family("mistral", "MistralForCausalLM", _mistral, _mistral_json, rules)
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _smollm3, _smollm3_json, rules)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, _qwen_json, rules)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_json, rules)
GLM = Family("glm", "GlmForCausalLM", _glm, _glm_json, lambda config: decoder_rules(config, _glm_layer))
