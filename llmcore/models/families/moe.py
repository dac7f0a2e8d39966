"""Decoders with a mixture of experts: Mixtral (arXiv 2401.04088), Qwen3-MoE (arXiv 2505.09388), GLM-4.5
(arXiv 2508.06471) and gpt-oss (arXiv 2508.10925)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import ModelConfig, MoEConfig
from llmcore.models.families.base import (
    Family,
    HFConfig,
    Rule,
    attention_rules,
    decoder_config,
    decoder_json,
    decoder_rules,
    expert_rules,
    fit_mtp,
    gated_mlp_rules,
    layer_types,
    pre_norm_rules,
    same,
    window_layers,
)


def _mixtral(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    moe = MoEConfig(c.need("num_local_experts"), c.need("num_experts_per_tok"), c.need("intermediate_size"))
    return ModelConfig(**decoder_config(c, window=c.get("sliding_window"), moe=moe, **c.rope(1e6)))


def _mixtral_json(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return decoder_json(
        config, sliding_window=config.window, num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k,
        intermediate_size=moe.ffn_dim,
    )  # fmt: skip


def _mixtral_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    yield from expert_rules(config, "block_sparse_moe.", ("w1", "w3", "w2"))


def _qwen3_moe(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    c.check("decoder_sparse_step", 1)
    c.check("mlp_only_layers", [])
    c.check("use_sliding_window", False)
    experts = c.get("num_experts") or c.need("num_local_experts")
    moe = MoEConfig(
        experts, c.need("num_experts_per_tok"), c.need("moe_intermediate_size"),
        renormalize=c.get("norm_topk_prob", False),
    )  # fmt: skip
    bias = c.get("attention_bias", False)
    return ModelConfig(**decoder_config(c, qk_norm=True, qkv_bias=bias, attention_out_bias=bias, moe=moe, **c.rope()))


def _qwen3_moe_json(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return decoder_json(
        config, attention_bias=config.qkv_bias, num_experts=moe.num_experts, num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.ffn_dim, norm_topk_prob=moe.renormalize, decoder_sparse_step=1, mlp_only_layers=[],
        use_sliding_window=False,
    )  # fmt: skip


def _qwen3_moe_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    yield from expert_rules(config)


def _glm4_moe(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    moe = MoEConfig(
        c.need("n_routed_experts"), c.need("num_experts_per_tok"), c.need("moe_intermediate_size"),
        shared_experts=c.get("n_shared_experts", 0), first_dense_layers=c.get("first_k_dense_replace", 0),
        score="sigmoid", num_groups=c.get("n_group", 1), topk_groups=c.get("topk_group", 1),
        renormalize=c.get("norm_topk_prob", True), scale=c.get("routed_scaling_factor", 1.0), balancing="bias",
    )  # fmt: skip
    rope = c.rope()
    if "partial_rotary_factor" not in (c.get("rope_parameters") or {}):
        rope["rope_fraction"] = c.get("partial_rotary_factor", 0.5)
    return ModelConfig(
        **decoder_config(
            c, qk_norm=c.get("use_qk_norm", False), qkv_bias=c.get("attention_bias", False), moe=moe,
            mtp_layers=c.get("num_nextn_predict_layers", 0), **rope,
        )
    )  # fmt: skip


def _glm4_moe_json(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    values = decoder_json(
        config, attention_bias=config.qkv_bias, use_qk_norm=config.qk_norm, n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k, moe_intermediate_size=moe.ffn_dim, n_shared_experts=moe.shared_experts,
        first_k_dense_replace=moe.first_dense_layers, n_group=moe.num_groups, topk_group=moe.topk_groups,
        norm_topk_prob=moe.renormalize, routed_scaling_factor=moe.scale, num_nextn_predict_layers=config.mtp_layers,
    )  # fmt: skip
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return values | {"partial_rotary_factor": config.rope_fraction}


def sparse_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    """The feed-forward part of a layer, of those whose first layers are dense."""
    dense = layer < config.moe.first_dense_layers
    yield from gated_mlp_rules(config.ffn_dim) if dense else expert_rules(config)


def _glm4_moe_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    yield from sparse_layer(config, layer)


def _gpt_oss(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", "silu")
    c.check("attention_bias", True)
    c.check("swiglu_alpha", 1.702)
    c.check("swiglu_limit", 7.0)
    ffn, window = c.need("intermediate_size"), c.get("sliding_window", 128)
    moe = MoEConfig(c.need("num_local_experts"), c.need("num_experts_per_tok"), ffn, bias=True)
    windowed = window_layers(c, window)
    if c.get("layer_types") is None:
        windowed = tuple(range(0, c.need("num_hidden_layers"), 2))
    return ModelConfig(
        **decoder_config(
            c, activation="swiglu_oss", qkv_bias=True, attention_out_bias=True, attention_sinks=True, window=window,
            window_layers=windowed, moe=moe, norm_eps=c.get("rms_norm_eps", 1e-5), **c.rope(150000.0),
        )
    )  # fmt: skip


def _gpt_oss_json(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return decoder_json(
        config, attention_bias=True, sliding_window=config.window, layer_types=layer_types(config),
        num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k, intermediate_size=moe.ffn_dim,
    )  # fmt: skip


def _unzip(tensor: Tensor) -> Tensor:
    """(experts, 2 * ffn, ...), gates and ups taking turns -> the gates first."""
    return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)


def _zip(tensor: Tensor) -> Tensor:
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


def _gpt_oss_layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from attention_rules(config)
    for kind in ("weight", "bias"):
        yield same(f"mlp.router.{kind}", f"mlp.router.{kind}")
    yield Rule(
        "mlp.gate_up", ("mlp.experts.gate_up_proj",),
        lambda t: _unzip(t[0].mT), lambda t: [_zip(t).mT.contiguous()],
    )  # fmt: skip
    yield Rule("mlp.gate_up_bias", ("mlp.experts.gate_up_proj_bias",), lambda t: _unzip(t[0]), lambda t: [_zip(t)])
    yield Rule("mlp.down", ("mlp.experts.down_proj",), lambda t: t[0].mT, lambda t: [t.mT.contiguous()])
    yield same("mlp.down_bias", "mlp.experts.down_proj_bias")


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", _mixtral, _mixtral_json, lambda config: decoder_rules(config, _mixtral_layer)
)
QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_json,
    lambda config: decoder_rules(config, _qwen3_moe_layer),
)  # fmt: skip
GLM4_MOE = Family(
    "glm4_moe", "Glm4MoeForCausalLM", _glm4_moe, _glm4_moe_json, lambda config: decoder_rules(config, _glm4_moe_layer),
    fit=fit_mtp,
)  # fmt: skip
GPT_OSS = Family(
    "gpt_oss", "GptOssForCausalLM", _gpt_oss, _gpt_oss_json, lambda config: decoder_rules(config, _gpt_oss_layer)
)
