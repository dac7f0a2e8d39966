"""BERT (arXiv 1810.04805): an encoder with norms behind the residual additions, learned positions, two kinds of tokens,
and a pooler or a head that predicts masked tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from llmcore.models.config import ModelConfig
from llmcore.models.families.base import Family, HFConfig, Rule, rows, same

_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "relu": "relu"}
_HEADS = {"BertModel": "none", "BertForMaskedLM": "mlm", "BertForPreTraining": "mlm"}


def _config(c: HFConfig) -> ModelConfig:
    c.check("hidden_act", *_ACTIVATIONS)
    c.check("position_embedding_type", "absolute")
    c.check("is_decoder", False)
    c.check("tie_word_embeddings", True)
    name = c.architecture(*_HEADS)
    return ModelConfig(
        vocab_size=c.need("vocab_size"), dim=c.need("hidden_size"), num_layers=c.need("num_hidden_layers"),
        num_heads=c.need("num_attention_heads"), ffn_dim=c.need("intermediate_size"),
        max_positions=c.need("max_position_embeddings"), token_types=c.get("type_vocab_size", 2),
        activation=_ACTIVATIONS[c.get("hidden_act", "gelu")], norm="layer", norm_eps=c.get("layer_norm_eps", 1e-12),
        norm_placement="post", embedding_norm=True, position="learned", causal=False, head=_HEADS[name],
        pooler=name != "BertForMaskedLM", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
        init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


def _json(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.activation not in names:
        raise ValueError(f"activation is {config.activation!r}; accepted: {', '.join(map(repr, names))}")
    return {
        "architectures": ["BertForMaskedLM" if config.head == "mlm" else "BertModel"],
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_positions, "type_vocab_size": config.token_types,
        "hidden_act": names[config.activation], "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute", "initializer_range": config.init_std,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip


def _fit(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """A BertModel may have been made without its pooler, and only the files tell."""
    return dataclasses.replace(config, pooler=config.pooler and "bert.pooler.dense.weight" in names)


def _both(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield same(f"{ours}.{kind}", f"{theirs}.{kind}")


def _rules(config: ModelConfig) -> Iterator[Rule]:
    embeddings = "bert.embeddings."
    for name, table in (("tokens", "word"), ("positions", "position"), ("types", "token_type")):
        yield same(f"embed_{name}.weight", f"{embeddings}{table}_embeddings.weight")
    yield from _both("embed_norm", embeddings + "LayerNorm")
    linears = {
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}.", f"bert.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [f"{theirs}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            yield rows(f"{ours}attention.qkv.{kind}", parts, [config.dim] * 3)
        for name, other in linears.items():
            yield from _both(ours + name, theirs + other)
    if config.pooler:
        yield from _both("pooler", "bert.pooler.dense")
    if config.head == "mlm":
        yield from _both("mlm_head.dense", "cls.predictions.transform.dense")
        yield from _both("mlm_head.norm", "cls.predictions.transform.LayerNorm")
        yield same("mlm_head.bias", "cls.predictions.bias")


# The head's matrix and bias have second names in older files, which also hold position ids and, of BertForPreTraining,
# a classifier of whether one sentence follows the other; their norms may have TensorFlow's names.
BERT = Family(
    "bert", "BertModel", _config, _json, _rules,
    ignored=(
        "embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
        "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    ),
    body="bert.", heads=("cls.",), renamed={".gamma": ".weight", ".beta": ".bias"}, in_files=("pooler",), fit=_fit,
)  # fmt: skip
