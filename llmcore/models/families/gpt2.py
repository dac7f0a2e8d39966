"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmcore.models.config import ModelConfig
from llmcore.models.families.base import Family, HFConfig, Rule, same, transposed


def _config(c: HFConfig) -> ModelConfig:
    c.check("activation_function", "gelu_new", "gelu_pytorch_tanh")
    c.check("scale_attn_weights", True)
    c.check("scale_attn_by_inverse_layer_idx", False)
    c.check("add_cross_attention", False)
    c.check("tie_word_embeddings", True)
    return ModelConfig(
        vocab_size=c.need("vocab_size"), dim=c.need("n_embd"), num_layers=c.need("n_layer"), num_heads=c.need("n_head"),
        ffn_dim=c.get("n_inner"), max_positions=c.need("n_positions"), norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation="gelu", norm="layer", position="learned", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
        init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


def _json(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "n_embd": config.dim, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.ffn_dim, "n_positions": config.max_positions, "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new", "initializer_range": config.init_std, "tie_word_embeddings": True,
        "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": 0.0,
    }  # fmt: skip


def _rules(config: ModelConfig) -> Iterator[Rule]:
    yield same("embed_tokens.weight", "transformer.wte.weight")
    yield same("embed_positions.weight", "transformer.wpe.weight")
    for kind in ("weight", "bias"):
        yield same(f"norm.{kind}", f"transformer.ln_f.{kind}")
    linears = {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        for norm, ln in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                yield same(f"{ours}{norm}.{kind}", f"{theirs}{ln}.{kind}")
        for linear, conv in linears.items():
            yield transposed(f"{ours}{linear}.weight", f"{theirs}{conv}.weight")
            yield same(f"{ours}{linear}.bias", f"{theirs}{conv}.bias")


# The published files hold the causal mask too, and no prefix "transformer." (see checkpoints.hf).
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", _config, _json, _rules, ignored=("attn.bias", "attn.masked_bias"), body="transformer."
)
