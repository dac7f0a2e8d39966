"""T5 (arXiv 1910.10683), its gated variant (v1.1, Flan-T5) and its encoder alone: norms without a bias, scores that are
not scaled, and a bias by distance that all layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from llmcore.models.config import ModelConfig
from llmcore.models.families.base import Family, HFConfig, Rule, rows, same

_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-gelu_new": "geglu", "gated-silu": "swiglu"}
_ENCODER, _BOTH = "T5EncoderModel", "T5ForConditionalGeneration"


def _config(c: HFConfig) -> ModelConfig:
    c.check("feed_forward_proj", *_ACTIVATIONS)
    alone = c.architecture(_BOTH, "T5Model", _ENCODER) == _ENCODER
    layers, dim = c.need("num_layers"), c.need("d_model")
    scaled = c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True))
    return ModelConfig(
        vocab_size=c.need("vocab_size"), dim=dim, num_heads=c.need("num_heads"), head_dim=c.need("d_kv"),
        ffn_dim=c.need("d_ff"), num_layers=layers if alone else c.get("num_decoder_layers", layers),
        encoder_layers=0 if alone else layers, causal=not alone, head="none" if alone else "linear",
        activation=_ACTIVATIONS[c.get("feed_forward_proj", "relu")], norm="rms",
        norm_eps=c.get("layer_norm_epsilon", 1e-6), position="relative",
        relative_buckets=c.get("relative_attention_num_buckets", 32),
        relative_max_distance=c.get("relative_attention_max_distance", 128), attention_scale=1.0,
        logit_scale=1.0 if alone or not scaled else dim**-0.5, tied_embeddings=c.get("tie_word_embeddings", True),
    )  # fmt: skip


def _json(config: ModelConfig) -> dict[str, Any]:
    names = {"relu": "relu", "geglu": "gated-gelu", "swiglu": "gated-silu"}
    alone = not config.encoder_layers
    return {
        "architectures": [_ENCODER if alone else _BOTH], "vocab_size": config.vocab_size, "d_model": config.dim,
        "num_heads": config.num_heads, "d_kv": config.head_dim, "d_ff": config.ffn_dim,
        "num_layers": config.num_layers if alone else config.encoder_layers, "num_decoder_layers": config.num_layers,
        "feed_forward_proj": names[config.activation], "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance, "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tied_embeddings, "scale_decoder_outputs": config.logit_scale != 1,
        "is_encoder_decoder": not alone, "use_cache": not alone, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }  # fmt: skip


def _fit(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """config.json says whether the hidden states are scaled, the files whether there is an output matrix."""
    return dataclasses.replace(config, tied_embeddings="lm_head.weight" not in names)


def _attention(ours: str, theirs: str, config: ModelConfig, *projections: str) -> Iterator[Rule]:
    """`projections`: ours, whose letters are theirs."""
    size = config.num_heads * config.head_dim
    for name in projections:
        yield rows(f"{ours}.{name}.weight", [f"{theirs}.{part}.weight" for part in name], [size] * len(name))
    yield same(f"{ours}.out.weight", f"{theirs}.o.weight")


def _stack(config: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    """One stack of layers; those of a decoder have a second attention."""
    decoder = config.encoder_layers > 0
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield same(f"{ours}relative_bias.weight", theirs + bias)
    yield same(f"{ours}norm.weight", f"{theirs}final_layer_norm.weight")
    for i in range(config.num_layers):
        block, layer = f"{ours}blocks.{i}.", f"{theirs}block.{i}.layer."
        yield from _attention(f"{block}attention", f"{layer}0.SelfAttention", config, "qkv")
        yield same(f"{block}attention_norm.weight", f"{layer}0.layer_norm.weight")
        if decoder:
            yield from _attention(f"{block}cross_attention", f"{layer}1.EncDecAttention", config, "q", "kv")
            yield same(f"{block}cross_attention_norm.weight", f"{layer}1.layer_norm.weight")
        last = f"{layer}{2 if decoder else 1}."
        yield same(f"{block}mlp_norm.weight", f"{last}layer_norm.weight")
        yield same(f"{block}mlp.down.weight", f"{last}DenseReluDense.wo.weight")
        if config.gated:
            halves = [f"{last}DenseReluDense.wi_{half}.weight" for half in (0, 1)]
            yield rows(f"{block}mlp.gate_up.weight", halves, [config.ffn_dim] * 2)
        else:
            yield same(f"{block}mlp.up.weight", f"{last}DenseReluDense.wi.weight")


def _rules(config: ModelConfig) -> Iterator[Rule]:
    yield same("embed_tokens.weight", "shared.weight")
    if not config.tied_embeddings:
        yield same("lm_head.weight")
    if config.encoder_layers:
        yield from _stack(config.encoder, "encoder.", "encoder.")
        yield from _stack(config, "decoder.", "decoder.")
    else:
        yield from _stack(config, "", "encoder.")


# Older files hold the token table under three names, and a bias of the second attention that nothing reads.
T5 = Family(
    "t5", _BOTH, _config, _json, _rules,
    ignored=("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight"),
    body=None, in_files=("tied_embeddings",), fit=_fit,
)  # fmt: skip
