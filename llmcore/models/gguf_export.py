"""Models as GGUF files hold them: the other way of `llmcore.models.gguf`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import ModelConfig
from llmcore.models.families import family_of
from llmcore.models.families.base import inference_settings
from llmcore.models.gguf import ARCHITECTURES, gguf_names
from llmcore.models.transformer import Transformer

_OF_FAMILY = {
    "llama": "llama", "mixtral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "olmo2": "olmo2", "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt2": "gpt2",
    "gpt_oss": "gpt-oss", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip


def gguf_architecture(config: ModelConfig) -> str:
    """The value of general.architecture for a model.

    Raises:
        ValueError: when none describes it.
    """
    family = family_of(config).model_type
    if family not in _OF_FAMILY:
        raise ValueError(f"no architecture of GGUF files for the family {family}; accepted: {', '.join(_OF_FAMILY)}")
    return _OF_FAMILY[family]


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """A file's metadata on the model. Not every setting has a place in them: read them back and compare."""
    arch = gguf_architecture(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size, "context_length": config.max_positions, "embedding_length": config.dim,
        "block_count": config.num_layers, "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim if config.mla is None else config.mla.v_head_dim,
        f"attention.layer_norm_{'rms_' if config.norm == 'rms' else ''}epsilon": config.norm_eps,
    }  # fmt: skip
    if config.position == "rope":
        values |= _rope(config)
    if config.window is not None:
        values["attention.sliding_window"] = config.window
    for name, cap in (("attn", config.attention_softcap), ("final", config.logit_softcap)):
        if cap is not None:
            values[f"{name}_logit_softcapping"] = cap
    if config.moe is not None:
        values |= _experts(config, arch)
    if config.mla is not None:
        values["attention.kv_lora_rank"] = config.mla.kv_lora_rank
        if config.mla.q_lora_rank is not None:
            values["attention.q_lora_rank"] = config.mla.q_lora_rank
    return {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in values.items()}}


def _rope(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope.dimension_count": config.rotary_dim, "rope.freq_base": config.rope_base}
    if config.local_rope_base is not None:
        values["rope.freq_base_swa"] = config.local_rope_base
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # that one is a tensor
        return values
    values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        values |= {
            "rope.scaling.original_context_length": scaling.original_max_positions,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast, "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }  # fmt: skip
        if scaling.mscale_all_dim:
            values["rope.scaling.yarn_log_multiplier"] = scaling.mscale_all_dim / 10
    return values


def _experts(config: ModelConfig, arch: str) -> dict[str, Any]:
    moe = config.moe
    values: dict[str, Any] = {"expert_count": moe.num_experts, "expert_used_count": moe.top_k}
    values["feed_forward_length" if arch == "llama" else "expert_feed_forward_length"] = moe.ffn_dim
    if arch != "deepseek2":
        return values
    values |= {
        "leading_dense_block_count": moe.first_dense_layers, "expert_shared_count": moe.shared_experts,
        "expert_weights_scale": moe.scale, "expert_weights_norm": moe.renormalize,
        "expert_gating_func": 2 if moe.score == "sigmoid" else 1,
    }  # fmt: skip
    if moe.num_groups > 1:
        values |= {"expert_group_count": moe.num_groups, "expert_group_used_count": moe.topk_groups}
    return values


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Each tensor of the file: its name, its shape and a function that gives it."""
    if model.is_quantized:
        raise ValueError("the model's weights are in blocks; accepted: one loaded with a dtype")
    config = model.config
    architecture = ARCHITECTURES[gguf_architecture(config)]
    for ours, tensor in model.state_dict().items():
        names = gguf_names(ours, architecture)
        heads = [None] * len(names)
        if architecture.permuted and ".attention.qkv." in ours:
            heads = [config.num_heads, config.num_kv_heads, None]
        shift = float(config.norm_unit_offset and ours.endswith("norm.weight"))
        for name, part, count in zip(names, _split(tensor, ours, len(names), config), heads):
            yield name, tuple(part.shape), _maker(part, count, shift)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        divisors = _llama3_divisors(config)
        yield "rope_freqs.weight", tuple(divisors.shape), lambda: divisors


def _maker(part: Tensor, heads: int | None, shift: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        if heads is not None:  # 0, 1, 2, ... of each head become 0, d/2, 1, d/2 + 1, ...
            order = torch.arange(part.shape[0], device=part.device).view(heads, 2, -1).transpose(1, 2).flatten()
            return part[order]
        return part.float() + shift if shift else part

    return make


def _split(tensor: Tensor, ours: str, count: int, config: ModelConfig) -> list[Tensor]:
    if count == 1:
        return [tensor]
    if ".attention.qkv." in ours:
        return list(tensor.split([n * config.head_dim for n in (config.num_heads, *[config.num_kv_heads] * 2)]))
    experts = config.moe is not None and ours.endswith((".mlp.gate_up", ".mlp.gate_up_bias"))
    return list(tensor.chunk(count, dim=int(experts)))


def _llama3_divisors(config: ModelConfig) -> Tensor:
    frequencies = config.rope_base ** -(
        torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    )  # fmt: skip
    scaled, _ = config.rope_scaling.apply(frequencies, config.rope_base)
    return (frequencies / scaled).float()


def same_for_inference(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations compute the same, numbers compared as float32."""
    return _agree(inference_settings(one), inference_settings(other))


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_agree(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * abs(a)
    return a == b
