"""What the family files are written in: a reader for `config.json`, and rules that name each of our tensors by those of
the Hugging Face form, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import ModelConfig
from llmcore.ops import RopeScaling

# Settings of a ModelConfig that matter to training alone and have no place in a config.json.
_TRAINING_ONLY = {"dropout": 0.0, "init_std": 0.02}


@dataclass(frozen=True)
class Rule:
    """One of our tensors, made of one or more of theirs: `join` makes it, `split` undoes that bit for bit. A `copy` is
    a further name that they give to it, written but not needed."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    copy: bool = False

    def under(self, ours: str, theirs: str) -> Rule:
        """The rule with prefixes before the names."""
        names = tuple(theirs + name for name in self.theirs)
        return dataclasses.replace(self, ours=ours + self.ours, theirs=names)


def same(ours: str, theirs: str | None = None) -> Rule:
    return Rule(ours, (ours if theirs is None else theirs,), lambda t: t[0], lambda t: [t])


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix that they hold as (in, out)."""
    return Rule(ours, (theirs,), lambda t: t[0].mT.contiguous(), lambda t: [t.mT.contiguous()])


def rows(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Ours is theirs one below the other, of `sizes` rows each."""
    return Rule(ours, tuple(theirs), lambda t: torch.cat(list(t)), lambda t: t.split(list(sizes)))


def stacked(ours: str, theirs: Sequence[Sequence[str]]) -> Rule:
    """Ours (len(theirs), ...) holds one expert each, whose matrices theirs[e] stand one below the other."""
    parts = len(theirs[0])

    def join(tensors: Sequence[Tensor]) -> Tensor:
        experts = [tensors[i : i + parts] for i in range(0, len(tensors), parts)]
        return torch.stack([torch.cat(list(expert)) for expert in experts])

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.contiguous() for expert in tensor for part in expert.chunk(parts)]

    return Rule(ours, tuple(name for expert in theirs for name in expert), join, split)


_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")


class HFConfig:
    """A `config.json` as its family reads it. Each error names the key, its value and what is accepted."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default when it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        if self.get(name) is None:
            raise ValueError(f"config.json has no {name!r}")
        return self.values[name]

    def check(self, name: str, *accepted: Any) -> None:
        """Raises unless the value is one of `accepted`, the first of which an absent key stands for."""
        value = self.get(name, accepted[0])
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")

    def architecture(self, *accepted: str) -> str:
        """The one entry of `architectures`, the first of `accepted` where there is none."""
        given = self.get("architectures", [accepted[0]])
        if not isinstance(given, list) or len(given) != 1 or given[0] not in accepted:
            raise ValueError(f"architectures is {given!r}; accepted: one of {', '.join(accepted)}")
        return given[0]

    def rope(self, default_base: float = 10000.0, layer_type: str | None = None) -> dict[str, Any]:
        """rope_base, rope_fraction and rope_scaling, from `rope_parameters` (transformers 5) or the older `rope_theta`,
        `rope_scaling` and `partial_rotary_factor`; of one `layer_type` where each has its own."""
        given = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"rope_parameters is {given!r}; accepted: an object")
        if layer_type is not None and layer_type in given:
            given = given[layer_type]
        kind = given.get("rope_type") or given.get("type") or "default"
        result = {
            "rope_base": float(given.get("rope_theta") or self.get("rope_theta", default_base)),
            "rope_fraction": float(given.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)),
            "rope_scaling": None,
        }
        if kind == "default":
            return result
        if kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_type is {kind!r}; accepted: 'default', 'linear', 'llama3', 'yarn'")
        original = given.get("original_max_position_embeddings") or self.get("original_max_position_embeddings")
        if kind != "linear" and original is None:
            original = self.get("max_position_embeddings")
        factor = given.get("factor")
        if factor is None and kind == "yarn":
            factor = self.need("max_position_embeddings") / original
        options = {name: given[name] for name in (*_LLAMA3, *_YARN) if given.get(name) is not None}
        if kind == "linear":
            original = None
        try:
            result["rope_scaling"] = RopeScaling(kind, factor, original, **options)
        except TypeError as error:
            raise ValueError(f"rope_parameters is {dict(given)!r}: {error}") from None
        return result


def hf_rope(base: float, fraction: float = 1.0, scaling: RopeScaling | None = None) -> dict[str, Any]:
    """`rope_parameters` of a config.json."""
    result: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": base}
    if fraction != 1.0:
        result["partial_rotary_factor"] = fraction
    if scaling is None:
        return result
    result["factor"] = scaling.factor
    names = {"linear": (), "llama3": _LLAMA3, "yarn": _YARN}[scaling.kind]
    if scaling.kind != "linear":
        result["original_max_position_embeddings"] = scaling.original_max_positions
    return result | {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type, architecture: as config.json names it, and the class that `transformers` makes of it.
        from_hf: config.json -> our configuration; raises ValueError for what the family can't be here.
        to_hf: our configuration -> config.json, without model_type and architectures.
        rules: our configuration -> the rules, one for each of our tensors.
        ignored: name endings of their tensors that hold nothing we lack.
        body: the prefix that a model saved without its head lacks; None: there is none.
        heads: beginnings of names outside the body.
        renamed: other endings of names in older files -> those that the rules use.
        in_files: settings that config.json leaves open and the files tell.
        fit: the configuration and the names in the files -> the configuration with those settings.
    """

    model_type: str
    architecture: str
    from_hf: Callable[[HFConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Iterable[Rule]]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    body: str | None = "model."
    heads: tuple[str, ...] = ("lm_head.",)
    renamed: Mapping[str, str] = field(default_factory=dict)
    in_files: tuple[str, ...] = ()
    fit: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda config, names: config

    def config(self, values: Mapping[str, Any]) -> ModelConfig:
        try:
            return self.from_hf(HFConfig(values))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.model_type}: {error}") from None

    def config_json(self, config: ModelConfig) -> dict[str, Any]:
        # without the last three transformers would fill in those of its own example of the family
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {"model_type": self.model_type, "architectures": [self.architecture], **tokens, **self.to_hf(config)}

    def fits(self, config: ModelConfig) -> bool:
        """Whether a config.json of this family says all that `config` says, but for what matters to training alone."""
        try:
            back = self.config(self.config_json(config))
            back = dataclasses.replace(back, **{name: getattr(config, name) for name in self.in_files})
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return inference_settings(back) == inference_settings(config)


def inference_settings(config: ModelConfig) -> dict[str, Any]:
    """A configuration without what matters to training alone."""
    values = config.to_dict() | _TRAINING_ONLY
    if config.moe is not None:
        values["moe"] = values["moe"] | {"balancing": config.moe.balancing == "bias", "aux_weight": 0, "bias_rate": 0}
    return values


# ---- what most decoders share --------------------------------------------------------------------------------------


def decoder_config(c: HFConfig, **more: Any) -> dict[str, Any]:
    """The keyword arguments of ModelConfig that nearly all decoders name alike; `more` adds to them."""
    values = {
        "vocab_size": c.need("vocab_size"),
        "dim": c.need("hidden_size"),
        "num_layers": c.need("num_hidden_layers"),
        "num_heads": c.need("num_attention_heads"),
        "num_kv_heads": c.get("num_key_value_heads"),
        "head_dim": c.get("head_dim"),
        "ffn_dim": c.need("intermediate_size"),
        "max_positions": c.need("max_position_embeddings"),
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "tied_embeddings": c.get("tie_word_embeddings", False),
        "init_std": c.get("initializer_range", 0.02),
    }
    return values | more


def decoder_json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """The keys of config.json that nearly all decoders share."""
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "rope_parameters": hf_rope(config.rope_base, config.rope_fraction, config.rope_scaling),
        "rope_theta": config.rope_base,  # where transformers before 5 looks
    }
    return values | more


def window_layers(c: HFConfig, window: int | None) -> tuple[int, ...] | None:
    """The layers that have the window, by `layer_types`; None: all."""
    types = c.get("layer_types")
    if types is None or window is None:
        return None
    wrong = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if wrong or len(types) != c.need("num_hidden_layers"):
        raise ValueError(f"layer_types is {types!r}; accepted: 'sliding_attention' or 'full_attention' for each layer")
    found = tuple(i for i, t in enumerate(types) if t == "sliding_attention")
    return None if len(found) == len(types) else found


def layer_types(config: ModelConfig) -> list[str]:
    return [
        "full_attention" if config.layer_window(i) is None else "sliding_attention" for i in range(config.num_layers)
    ]


def decoder_rules(
    config: ModelConfig, layer: Callable[[ModelConfig, int], Iterable[Rule]], body: str = "model."
) -> Iterator[Rule]:
    """The embeddings, the last norm, the output matrix, and `layer`'s rules for every layer."""
    yield same("embed_tokens.weight", body + "embed_tokens.weight")
    yield same("norm.weight", body + "norm.weight")
    if not config.tied_embeddings:
        yield same("lm_head.weight")
    for i in range(config.num_layers):
        for rule in layer(config, i):
            yield rule.under(f"blocks.{i}.", f"{body}layers.{i}.")
    for k in range(config.mtp_layers):
        yield from mtp_rules(config, k, layer)


def mtp_rules(config: ModelConfig, depth: int, layer: Callable[[ModelConfig, int], Iterable[Rule]]) -> Iterator[Rule]:
    """A multi-token-prediction module, which they count among the layers, with copies of what it shares."""
    i = config.num_layers + depth
    ours, theirs = f"mtp.{depth}.", f"model.layers.{i}."
    names = {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}
    for name, other in names.items():
        yield same(f"{ours}{name}.weight", f"{theirs}{other}.weight")
    for rule in layer(config, i):
        yield rule.under(f"{ours}block.", theirs)
    head = "embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    for name, other in (("embed_tokens.weight", "embed_tokens"), (head, "shared_head.head")):
        yield dataclasses.replace(same(name, f"{theirs}{other}.weight"), copy=True)


def fit_mtp(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """config.json may count multi-token-prediction modules that the files leave out."""
    there = f"model.layers.{config.num_layers}.enorm.weight" in names
    return config if there else dataclasses.replace(config, mtp_layers=0)


def attention_rules(config: ModelConfig) -> Iterator[Rule]:
    """Under self_attn: q_proj, k_proj and v_proj, which we hold as one, o_proj, the norms of q and k, and sinks."""
    sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    kinds = [("qkv", config.qkv_bias), ("out", config.attention_out_bias)]
    for name, bias in kinds:
        for kind in ("weight", "bias") if bias else ("weight",):
            if name == "qkv":
                yield rows(f"attention.qkv.{kind}", [f"self_attn.{p}_proj.{kind}" for p in "qkv"], sizes)
            else:
                yield same(f"attention.out.{kind}", f"self_attn.o_proj.{kind}")
    if config.qk_norm:
        yield same("attention.q_norm.weight", "self_attn.q_norm.weight")
        yield same("attention.k_norm.weight", "self_attn.k_norm.weight")
    if config.attention_sinks:
        yield same("attention.sinks", "self_attn.sinks")


def gated_mlp_rules(ffn_dim: int, bias: bool = False, ours: str = "mlp.", theirs: str = "mlp.") -> Iterator[Rule]:
    for kind in ("weight", "bias") if bias else ("weight",):
        halves = [f"{theirs}{p}_proj.{kind}" for p in ("gate", "up")]
        yield rows(f"{ours}gate_up.{kind}", halves, [ffn_dim, ffn_dim])
        yield same(f"{ours}down.{kind}", f"{theirs}down_proj.{kind}")


def expert_rules(
    config: ModelConfig, theirs: str = "mlp.", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Rule]:
    """The router and one module per expert under `theirs`."""
    moe = config.moe
    gate, up, down = names
    experts = [f"{theirs}experts.{e}." for e in range(moe.num_experts)]
    yield same("mlp.router.weight", f"{theirs}gate.weight")
    yield stacked("mlp.gate_up", [(f"{e}{gate}.weight", f"{e}{up}.weight") for e in experts])
    yield stacked("mlp.down", [(f"{e}{down}.weight",) for e in experts])
    if moe.balancing == "bias":
        yield same("mlp.expert_bias", f"{theirs}gate.e_score_correction_bias")
    if moe.shared_experts:
        yield from gated_mlp_rules(moe.shared_experts * moe.ffn_dim, False, "mlp.shared.", f"{theirs}shared_experts.")


def pre_norm_rules() -> Iterator[Rule]:
    yield same("attention_norm.weight", "input_layernorm.weight")
    yield same("mlp_norm.weight", "post_attention_layernorm.weight")
