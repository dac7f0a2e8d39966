"""Models from GGUF files: for each architecture, how its metadata says what a family's config.json would, and which
tensors of the file make ours. Rows are joined as the file holds them, so a quantised matrix can stay quantised.

What the form changes is undone here: the rows of Llama's queries and keys are stored in the order that rotates
neighbouring features, and Gemma's gains with their 1 added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.checkpoints import CheckpointError
from llmcore.checkpoints.gguf import BLOCKS, FLOATS, GGUFFile, GGUFTensor
from llmcore.layers import Linear, MoE, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from llmcore.models.config import ModelConfig
from llmcore.models.families import FAMILIES
from llmcore.models.meta import meta_model
from llmcore.models.pretrained import MAX_COUNT, build_rope_tables
from llmcore.models.transformer import Transformer
from llmcore.ops import RopeScaling


class _Metadata:
    """The entries of a file's architecture. Each error names the key and its value."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.values: Mapping[str, Any] = file.metadata
        self.architecture = self.values.get("general.architecture")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a number or text, or the default. float32 values as one would write them: 1e-05."""
        value = self.values.get(f"{self.architecture}.{name}", default)
        if isinstance(value, np.ndarray):  # one for each layer
            if len(value) == 0 or (value != value[0]).any():
                raise ValueError(f"{self.architecture}.{name} is {value.tolist()}; accepted: the same for all layers")
            value = value[0].item()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise ValueError(f"has no metadata {f'{self.architecture}.{name}'!r}")
        return value

    def count(self, name: str, default: Any = None) -> int:
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.architecture}.{name} is {value!r}; accepted: a whole number")
        return value

    def rows(self, tensor: str) -> int:
        if tensor not in self.file:
            raise ValueError(f"tensor {tensor!r} is missing")
        return self.file.shape(tensor)[0]


def _decoder(m: _Metadata) -> dict[str, Any]:
    """The keys of config.json that nearly all decoders share."""
    heads = m.count("attention.head_count")
    if heads < 1:
        raise ValueError(f"{m.architecture}.attention.head_count is {heads}; accepted: 1 or more")
    head_dim = m.count("attention.key_length", m.count("embedding_length") // heads)
    if (value_dim := m.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(f"{m.architecture}.attention.value_length is {value_dim}; accepted: key_length = {head_dim}")
    return {
        "vocab_size": m.rows("token_embd.weight"),
        "hidden_size": m.count("embedding_length"),
        "num_hidden_layers": m.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": m.count("feed_forward_length"),
        "max_position_embeddings": m.count("context_length"),
        "rms_norm_eps": m.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in m.file,
        "attention_bias": "blk.0.attn_q.bias" in m.file,
        "rope_parameters": _rope(m, m.count("rope.dimension_count", head_dim), head_dim),
    }


def _rope(m: _Metadata, rotary_dim: int, head_dim: int, **yarn: Any) -> dict[str, Any]:
    base = m.get("rope.freq_base", 10000.0)
    result: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if rotary_dim != head_dim:
        result["partial_rotary_factor"] = rotary_dim / head_dim
    kind = m.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{m.architecture}.rope.scaling.type is {kind!r}; accepted: 'none', 'linear', 'yarn'")
    if kind != "none":
        result |= {"rope_type": kind, "factor": m.need("rope.scaling.factor")}
    if kind == "yarn":
        result["original_max_position_embeddings"] = m.need("rope.scaling.original_context_length")
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := m.get(f"rope.scaling.{theirs}")) is not None:
                result[ours] = value
        result |= yarn
    if "rope_freqs.weight" in m.file:
        if kind != "none":
            raise ValueError(f"has rope_freqs.weight and {m.architecture}.rope.scaling.type {kind!r}; accepted: one")
        result |= _llama3(m.file["rope_freqs.weight"], base, rotary_dim)
    return result


def _llama3(tensor: GGUFTensor, base: float, rotary_dim: int) -> dict[str, Any]:
    """Llama 3's scaling out of what each frequency is divided by: 1 for the fast ones, the factor for the slow ones,
    and between them a mix from which the original length follows."""
    divisors, (low, high) = tensor.data.double().flatten(), (1.0, 4.0)
    factor = divisors.max().item() if tensor.format == "f32" and len(divisors) == rotary_dim // 2 else 0.0
    if not 1 < factor < math.inf:
        raise ValueError(f"rope_freqs.weight: {tensor.format} {tuple(tensor.shape)}, largest {factor}; not understood")
    frequencies = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    mixed = (kept > 1e-3) & (kept < 1 - 1e-3)
    if mixed.any():
        lengths = (kept * (high - low) + low) * 2 * math.pi / frequencies
        original = round(lengths[mixed].median().item())
        again, _ = RopeScaling("llama3", factor, original, low, high).apply(frequencies, base)
        if torch.allclose(frequencies / again, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise ValueError("rope_freqs.weight is not what Llama 3's scaling gives; accepted: that of Llama 3")


def _llama(m: _Metadata) -> dict[str, Any]:
    values = _decoder(m) | {"mlp_bias": "blk.0.ffn_down.bias" in m.file}
    if m.count("expert_count", 0):
        values |= {"num_local_experts": m.count("expert_count"), "num_experts_per_tok": m.count("expert_used_count")}
    return values


def _qwen3_moe(m: _Metadata) -> dict[str, Any]:
    return _decoder(m) | {
        "num_experts": m.count("expert_count"), "num_experts_per_tok": m.count("expert_used_count"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"), "norm_topk_prob": True,
    }  # fmt: skip


def _gpt2(m: _Metadata) -> dict[str, Any]:
    return {
        "vocab_size": m.rows("token_embd.weight"), "n_embd": m.count("embedding_length"),
        "n_layer": m.count("block_count"), "n_head": m.count("attention.head_count"),
        "n_inner": m.count("feed_forward_length"), "n_positions": m.count("context_length"),
        "layer_norm_epsilon": m.need("attention.layer_norm_epsilon"),
    }  # fmt: skip


def _gemma(m: _Metadata, layers_of_27b: int) -> dict[str, Any]:
    values = _decoder(m) | {"tie_word_embeddings": True, "sliding_window": m.count("attention.sliding_window")}
    # the file has no scale of the scores: that of the largest model differs from the others'
    largest = values["num_hidden_layers"] == layers_of_27b
    values["query_pre_attn_scalar"] = (
        values["hidden_size"] // values["num_attention_heads"] if largest else values["head_dim"]
    )
    return values


def _gemma2(m: _Metadata) -> dict[str, Any]:
    return _gemma(m, 46) | {
        "attn_logit_softcapping": m.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.get("final_logit_softcapping", 30.0),
    }


def _gemma3(m: _Metadata) -> dict[str, Any]:
    values = _gemma(m, 62) | {"final_logit_softcapping": m.get("final_logit_softcapping")}
    everywhere = values["rope_parameters"] | {"rope_theta": m.get("rope.freq_base", 1e6)}
    local = {"rope_type": "default", "rope_theta": m.get("rope.freq_base_swa", 10000.0)}
    return values | {"rope_parameters": {"full_attention": everywhere, "sliding_attention": local}}


def _gpt_oss(m: _Metadata) -> dict[str, Any]:
    values = _decoder(m)
    if values["rope_parameters"]["rope_type"] == "yarn":
        values["rope_parameters"].setdefault("truncate", False)
    return values | {
        "num_local_experts": m.count("expert_count"), "num_experts_per_tok": m.count("expert_used_count"),
        "intermediate_size": m.count("expert_feed_forward_length"),
        "sliding_window": m.count("attention.sliding_window"),
    }  # fmt: skip


def _deepseek2(m: _Metadata) -> dict[str, Any]:
    rotary_dim = m.count("rope.dimension_count")
    head_dim = m.count("attention.key_length_mla", m.count("attention.key_length"))
    log_mul = m.get("rope.scaling.yarn_log_multiplier")
    yarn = {} if log_mul is None else {"mscale": 10 * log_mul, "mscale_all_dim": 10 * log_mul}
    experts = m.count("expert_count", 0)
    values = {
        "vocab_size": m.rows("token_embd.weight"), "hidden_size": m.count("embedding_length"),
        "num_hidden_layers": m.count("block_count"), "num_attention_heads": m.count("attention.head_count"),
        "intermediate_size": m.count("feed_forward_length"), "max_position_embeddings": m.count("context_length"),
        "rms_norm_eps": m.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in m.file,
        "q_lora_rank": m.get("attention.q_lora_rank") or None, "kv_lora_rank": m.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary_dim, "qk_nope_head_dim": head_dim - rotary_dim,
        "v_head_dim": m.count("attention.value_length_mla", m.count("attention.value_length")),
        "rope_parameters": _rope(m, rotary_dim, rotary_dim, **yarn),
    }  # fmt: skip
    if not experts:
        return values
    values |= {
        "n_routed_experts": experts, "num_experts_per_tok": m.count("expert_used_count"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"),
        "n_shared_experts": m.count("expert_shared_count", 0),
        "first_k_dense_replace": m.count("leading_dense_block_count", 0),
        "routed_scaling_factor": m.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(m.get("expert_weights_norm", False)),
    }  # fmt: skip
    if (groups := m.count("expert_group_count", 1)) > 1:
        values |= {"n_group": groups, "topk_group": m.count("expert_group_used_count")}
        if not _sigmoid(m):
            values["topk_method"] = "group_limited_greedy"
    return values


def _sigmoid(m: _Metadata) -> bool:
    """Whether the router's scores are sigmoids (DeepSeek-V3), not a softmax (V2)."""
    if (kind := m.get("expert_gating_func", 1)) not in (1, 2):
        raise ValueError(f"{m.architecture}.expert_gating_func is {kind!r}; accepted: 1 (softmax), 2 (sigmoid)")
    return kind == 2


# Our modules -> the tensors whose rows they are, one below the other, with the ending .weight or .bias of ours.
_BODY = {
    "embed_tokens": ("token_embd",), "embed_positions": ("position_embd",), "norm": ("output_norm",),
    "lm_head": ("output",),
}  # fmt: skip
_LAYER = {
    "attention_norm": ("attn_norm",), "mlp_norm": ("ffn_norm",),
    "attention_out_norm": ("post_attention_norm",), "mlp_out_norm": ("post_ffw_norm",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"), "attention.out": ("attn_output",),
    "attention.q_norm": ("attn_q_norm",), "attention.k_norm": ("attn_k_norm",),
    "attention.q": ("attn_q",), "attention.q_a": ("attn_q_a",), "attention.q_a_norm": ("attn_q_a_norm",),
    "attention.q_b": ("attn_q_b",), "attention.kv_a": ("attn_kv_a_mqa",), "attention.kv_a_norm": ("attn_kv_a_norm",),
    "attention.kv_b": ("attn_kv_b",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"), "mlp.up": ("ffn_up",), "mlp.down": ("ffn_down",),
    "mlp.router": ("ffn_gate_inp",), "mlp.shared.gate_up": ("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared.down": ("ffn_down_shexp",),
}  # fmt: skip
# Our tensors that are no module's weight or bias, with the ending that the file's have.
_LAYER_TENSORS = {
    "attention.sinks": ("attn_sinks.weight",), "mlp.expert_bias": ("exp_probs_b.bias",),
    "mlp.gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "mlp.down": ("ffn_down_exps.weight",),
    "mlp.gate_up_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"), "mlp.down_bias": ("ffn_down_exps.bias",),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        family: the `model_type` of the family it is, by its metadata.
        config: metadata -> what the family's config.json says.
        permuted: the rows of queries and keys are in the order that rotates neighbouring features.
        names: what differs from the names above.
    """

    family: Callable[[_Metadata], str]
    config: Callable[[_Metadata], dict[str, Any]]
    permuted: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _always(model_type: str) -> Callable[[_Metadata], str]:
    return lambda m: model_type


ARCHITECTURES = {
    "llama": Architecture(lambda m: "mixtral" if m.count("expert_count", 0) else "llama", _llama, permuted=True),
    "smollm3": Architecture(_always("smollm3"), _llama, permuted=True),
    "qwen2": Architecture(_always("qwen2"), _decoder),
    "qwen3": Architecture(_always("qwen3"), _decoder),
    "qwen3moe": Architecture(_always("qwen3_moe"), _qwen3_moe),
    "olmo2": Architecture(_always("olmo2"), _decoder),
    "gemma2": Architecture(_always("gemma2"), _gemma2),
    "gemma3": Architecture(_always("gemma3_text"), _gemma3),
    "gpt2": Architecture(_always("gpt2"), _gpt2, names={"attention.qkv": ("attn_qkv",)}),
    "gpt-oss": Architecture(_always("gpt_oss"), _gpt_oss, names={"mlp_norm": ("post_attention_norm",)}),
    "deepseek2": Architecture(lambda m: "deepseek_v3" if _sigmoid(m) else "deepseek_v2", _deepseek2),
}  # fmt: skip


def gguf_config(file: GGUFFile) -> tuple[Architecture, ModelConfig]:
    """The architecture and configuration of a file.

    Raises:
        CheckpointError: for an unknown architecture, or metadata that is missing or of a wrong value.
    """
    metadata = _Metadata(file)
    architecture = ARCHITECTURES.get(metadata.architecture) if isinstance(metadata.architecture, str) else None
    if architecture is None:
        raise CheckpointError(
            f"{file.path}: general.architecture is {metadata.architecture!r}; accepted: {', '.join(ARCHITECTURES)}"
        )
    try:
        for name, most in (("block_count", len(file)), ("expert_count", MAX_COUNT)):  # what lists are made by
            if (count := metadata.count(name, 0)) > most:
                raise ValueError(f"{metadata.architecture}.{name} is {count}; accepted: up to {most}")
        family = FAMILIES[architecture.family(metadata)]
        return architecture, family.config(architecture.config(metadata))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def gguf_names(ours: str, architecture: Architecture) -> tuple[str, ...]:
    """The file's tensors that make up a tensor of our state dict."""
    prefix = ""
    if ours.startswith("blocks."):
        _, layer, ours = ours.split(".", 2)
        prefix = f"blk.{layer}."
        if ours in _LAYER_TENSORS:
            return tuple(prefix + name for name in _LAYER_TENSORS[ours])
    module, _, kind = ours.rpartition(".")
    names = architecture.names.get(module) or (_LAYER if prefix else _BODY)[module]
    return tuple(f"{prefix}{name}.{kind}" for name in names)


def load_gguf(
    path: str | Path | GGUFFile, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The model of a GGUF file, in evaluation mode.

    Args:
        path: of the file, or the open file.
        dtype: of the weights, all of them; None: matrices in blocks stay in blocks, and the rest has the dtype of the
            token embeddings, float32 beside blocks.
        device: where the model goes.

    Raises:
        CheckpointError: naming the file and what is wrong: no whole GGUF file, an unknown architecture, an unsupported
            setting, a tensor that is missing, of another shape than the metadata says, or without a place.
    """
    file = path if isinstance(path, GGUFFile) else GGUFFile(path)
    architecture, config = gguf_config(file)
    try:
        model = meta_model(config, len(file))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    if dtype is None and not any(file.format(name) in BLOCKS for name in file):
        dtype = FLOATS[file.format("token_embd.weight")]
    used: set[str] = set()
    with torch.no_grad():
        for ours, wanted in model.state_dict().items():
            parts = _parts(file, ours, architecture, config, used)
            _check_shape(file, ours, parts, tuple(wanted.shape), config)
            _place(model, ours, parts, dtype, device)
    _check_all_used(file, used, config)
    build_rope_tables(model, file.path, sum(tensor.nbytes for tensor in model.state_dict().values()), device)
    if model.is_quantized:  # its products have no gradient
        model.requires_grad_(False)
    return model.eval()


def _parts(
    file: GGUFFile, ours: str, architecture: Architecture, config: ModelConfig, used: set[str]
) -> list[GGUFTensor]:
    """The tensors whose rows make up ours, in the order and with the values that ours has."""
    names = gguf_names(ours, architecture)
    if config.mla is not None and ours.endswith("attention.kv_b.weight") and names[0] not in file:
        return [_latent_heads(file, names[0].removesuffix("attn_kv_b.weight"), used)]
    used.update(names)
    parts = [file[name] for name in names]
    if architecture.permuted and ".attention.qkv." in ours:
        parts[0] = _unpermuted(parts[0], config.num_heads)
        parts[1] = _unpermuted(parts[1], config.num_kv_heads)
    if config.norm_unit_offset and ours.endswith("norm.weight"):
        parts = [GGUFTensor("f32", part.shape, dequantize(part) - 1) for part in parts]
    return parts


def _unpermuted(part: GGUFTensor, heads: int) -> GGUFTensor:
    """Rows (0, d/2, 1, d/2 + 1, ...) of each head back in the order 0, 1, 2, ..."""
    if part.shape[0] % (2 * heads):
        return part  # its shape will be refused
    order = torch.arange(part.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
    return GGUFTensor(part.format, part.shape, part.data[order])


def _latent_heads(file: GGUFFile, prefix: str, used: set[str]) -> GGUFTensor:
    """The matrix from the latent to the heads, which newer files hold as two: that of the keys, transposed so that it
    can be absorbed by the queries, and that of the values."""
    names = (f"{prefix}attn_k_b.weight", f"{prefix}attn_v_b.weight")
    used.update(names)
    keys, values = (dequantize(file[name]) for name in names)  # (heads, latent, nope), (heads, v, latent)
    if keys.ndim != 3 or values.ndim != 3 or keys.shape[:2] != (values.shape[0], values.shape[2]):
        raise CheckpointError(
            f"{file.path}: tensors {names[0]!r} and {names[1]!r} have shapes {tuple(keys.shape)} and "
            f"{tuple(values.shape)}; accepted: (heads, latent, key) and (heads, value, latent)"
        )
    joined = torch.cat([keys.mT, values], dim=1).flatten(0, 1)
    return GGUFTensor("f32", tuple(joined.shape), joined)


def _join_dim(parts: Sequence[GGUFTensor], ours: str, config: ModelConfig) -> int:
    """Experts' tensors have the expert first."""
    return int(config.moe is not None and ours.endswith((".mlp.gate_up", ".mlp.gate_up_bias")))


def _check_shape(
    file: GGUFFile, ours: str, parts: Sequence[GGUFTensor], wanted: tuple[int, ...], config: ModelConfig
) -> None:
    dim, shapes = _join_dim(parts, ours, config), [part.shape for part in parts]
    same = all(len(s) == len(wanted) and s[:dim] + s[dim + 1 :] == wanted[:dim] + wanted[dim + 1 :] for s in shapes)
    if not same or sum(shape[dim] for shape in shapes) != wanted[dim]:
        names = gguf_names(ours, ARCHITECTURES[file.metadata["general.architecture"]])
        raise CheckpointError(
            f"{file.path}: tensor {names[0]!r} gives shape {' + '.join(map(str, shapes))}; the metadata asks for "
            f"{wanted} in all"
        )


def _place(
    model: Transformer, ours: str, parts: Sequence[GGUFTensor], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Gives the model its tensor `ours`: the rows of the parts, each of which may have a format of its own. Without a
    dtype, matrices in blocks stay so."""
    if dtype is None and all(part.quantized for part in parts) and _place_blocks(model, ours, parts, device):
        return
    dtype = torch.float32 if dtype is None else dtype
    wanted = torch.float32 if ours.endswith("expert_bias") else dtype
    dim = _join_dim(parts, ours, model.config)
    tensors = [dequantize(part).to(device, wanted) for part in parts]
    tensor = torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0].clone()  # no view of the file stays
    module, _, leaf = ours.rpartition(".")
    owner = model.get_submodule(module)
    if isinstance(owner, QuantizedLinear):
        owner.bias = nn.Parameter(tensor, requires_grad=False)
    else:
        setattr(owner, leaf, nn.Parameter(tensor) if leaf in owner._parameters else tensor)


def _place_blocks(model: Transformer, ours: str, parts: Sequence[GGUFTensor], device: torch.device | str) -> bool:
    """Puts quantised experts in the place of a parameter of theirs, and a quantised layer in that of a linear one or of
    the table. False where numbers are needed."""
    path, _, leaf = ours.rpartition(".")
    above, _, name = path.rpartition(".")
    owner = model.get_submodule(above)
    layer = getattr(owner, name) if path else None
    blocks = [(part.format, part.data) for part in parts]
    if isinstance(layer, MoE) and leaf in ("gate_up", "down"):
        layer.set_quantized(leaf, QuantizedExperts(blocks).to(device))
    elif name == "embed_tokens":
        setattr(owner, name, QuantizedEmbedding(*blocks[0]).to(device))
    elif leaf == "weight" and (isinstance(layer, Linear) or name == "lm_head") and name != "kv_b":  # which is absorbed
        setattr(owner, name, QuantizedLinear(blocks).to(device))
    else:
        return False
    return True


def dequantize(part: GGUFTensor) -> Tensor:
    """The numbers of a tensor: floats as they are, those of a block format in float32."""
    if not part.quantized:
        return part.data
    return ops.dequantize(part.data.flatten(0, -2), part.format).view(part.shape)


def _check_all_used(file: GGUFFile, used: set[str], config: ModelConfig) -> None:
    """Raises for a tensor without a place. A tied output matrix may stand in the file once more."""
    for name in file:
        if name in used or name == "rope_freqs.weight":
            continue
        if name == "output.weight" and config.tied_embeddings:
            table, output = file["token_embd.weight"], file[name]
            if table.format == output.format and torch.equal(table.data, output.data):
                continue
        raise CheckpointError(f"{file.path}: tensor {name!r} has no place in this model")
