"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, experts of which the first layers have
none, chosen among the best groups; V3 with multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmcore.models.config import MLAConfig, ModelConfig, MoEConfig
from llmcore.models.families.base import (
    Family,
    HFConfig,
    Rule,
    decoder_config,
    decoder_json,
    decoder_rules,
    fit_mtp,
    pre_norm_rules,
    same,
)
from llmcore.models.families.moe import sparse_layer


def _shared(c: HFConfig, moe: MoEConfig | None, mtp_layers: int = 0) -> ModelConfig:
    c.check("hidden_act", "silu")
    mla = MLAConfig(
        kv_lora_rank=c.need("kv_lora_rank"), q_lora_rank=c.get("q_lora_rank"),
        qk_nope_head_dim=c.need("qk_nope_head_dim"), qk_rope_head_dim=c.need("qk_rope_head_dim"),
        v_head_dim=c.need("v_head_dim"),
    )  # fmt: skip
    rope = c.rope()
    scaling, scale = rope["rope_scaling"], None
    if scaling is not None and scaling.mscale_all_dim:  # the amplitude that cos and sin leave to the logits
        scale = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5 * scaling.magnitude(scaling.mscale_all_dim) ** 2
    bias = c.get("attention_bias", False)
    return ModelConfig(
        **decoder_config(
            c, num_kv_heads=None, head_dim=None, mla=mla, moe=moe, qkv_bias=bias, attention_out_bias=bias,
            mtp_layers=mtp_layers, attention_scale=scale, rope_interleaved=c.get("rope_interleave", True), **rope,
        )
    )  # fmt: skip


def _experts(c: HFConfig, **more: Any) -> MoEConfig | None:
    if c.get("n_routed_experts") is None or c.get("first_k_dense_replace", 0) >= c.need("num_hidden_layers"):
        return None
    c.check("moe_layer_freq", 1)
    return MoEConfig(
        c.need("n_routed_experts"), c.need("num_experts_per_tok"), c.need("moe_intermediate_size"),
        shared_experts=c.get("n_shared_experts", 0), first_dense_layers=c.get("first_k_dense_replace", 0),
        scale=c.get("routed_scaling_factor", 1.0), **more,
    )  # fmt: skip


def _v2(c: HFConfig) -> ModelConfig:
    c.check("topk_method", "greedy", "group_limited_greedy")
    groups = {}
    if c.get("topk_method") == "group_limited_greedy":
        groups = {"num_groups": c.need("n_group"), "topk_groups": c.need("topk_group")}
    c.check("scoring_func", "softmax")
    c.check("norm_topk_prob", False)
    return _shared(c, _experts(c, renormalize=False, **groups))


def _v3(c: HFConfig) -> ModelConfig:
    c.check("topk_method", "noaux_tc")
    c.check("scoring_func", "sigmoid")
    return _shared(
        c,
        _experts(
            c, score="sigmoid", num_groups=c.get("n_group", 1), topk_groups=c.get("topk_group", 1),
            renormalize=c.get("norm_topk_prob", True), balancing="bias",
        ),
        c.get("num_nextn_predict_layers", 0),
    )  # fmt: skip


def _json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    mla, moe = config.mla, config.moe
    values = decoder_json(
        config, kv_lora_rank=mla.kv_lora_rank, q_lora_rank=mla.q_lora_rank, qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim, v_head_dim=mla.v_head_dim, attention_bias=config.qkv_bias,
        head_dim=mla.qk_rope_head_dim, first_k_dense_replace=config.num_layers,
    )  # fmt: skip
    if moe is not None:
        values |= {
            "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn_dim,
            "n_shared_experts": moe.shared_experts, "first_k_dense_replace": moe.first_dense_layers,
            "routed_scaling_factor": moe.scale, "n_group": moe.num_groups, "topk_group": moe.topk_groups,
            "norm_topk_prob": moe.renormalize,
        }  # fmt: skip
    return values | more


def _v2_json(config: ModelConfig) -> dict[str, Any]:
    grouped = config.moe is not None and config.moe.num_groups > 1
    return _json(config, topk_method="group_limited_greedy" if grouped else "greedy", scoring_func="softmax")


def _v3_json(config: ModelConfig) -> dict[str, Any]:
    return _json(
        config, topk_method="noaux_tc", scoring_func="sigmoid", rope_interleave=config.rope_interleaved,
        num_nextn_predict_layers=config.mtp_layers,
    )  # fmt: skip


def _attention(config: ModelConfig) -> Iterator[Rule]:
    ours, theirs = "attention.", "self_attn."
    names = {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "out": "o_proj"}
    if config.mla.q_lora_rank is None:
        names["q"] = "q_proj"
    else:
        names |= {"q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj"}
    for name, other in names.items():
        yield same(f"{ours}{name}.weight", f"{theirs}{other}.weight")
    biased = {"q_a": config.qkv_bias, "kv_a": config.qkv_bias, "out": config.attention_out_bias}
    for name, bias in biased.items():
        if bias and name in names:
            yield same(f"{ours}{name}.bias", f"{theirs}{names[name]}.bias")


def _layer(config: ModelConfig, layer: int) -> Iterator[Rule]:
    yield from pre_norm_rules()
    yield from _attention(config)
    yield from sparse_layer(config, layer)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    return decoder_rules(config, _layer)


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _v2, _v2_json, _rules)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _v3, _v3_json, _rules, fit=fit_mtp)
