"""OLMo 2 (arXiv 2501.00656): norms on the outputs of the sublayers, and on all queries and keys of a token as one."""

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
    same,
)


def _config(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    bias = c.get("attention_bias", False)
    return ModelConfig(
        **decoder_config(
            c, norm_placement="output", qk_norm=True, qk_norm_scope="all", qkv_bias=bias, attention_out_bias=bias,
            norm_eps=c.get("rms_norm_eps", 1e-5), **c.rope(),
        )
    )  # fmt: skip


def _json(config: ModelConfig) -> dict[str, Any]:
    return decoder_json(config, attention_bias=config.qkv_bias)


def _layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield same("attention_out_norm.weight", "post_attention_layernorm.weight")
    yield same("mlp_out_norm.weight", "post_feedforward_layernorm.weight")
    yield from attention_rules(config)
    yield from gated_mlp_rules(config.ffn_dim)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    return decoder_rules(config, _layer)


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _config, _json, _rules)
