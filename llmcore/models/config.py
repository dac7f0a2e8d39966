"""What a model is: one dataclass, validated when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmcore.ops import RopeScaling


def _accepted(hint: Any) -> tuple[Any, ...]:
    return (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` when it is of type `hint` (an int stands for a float), else an error naming both."""
    accepted = _accepted(hint)
    if get_origin(hint) is Literal:
        if value in accepted:
            return value
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
    if tuple[int, ...] in accepted:
        if value is None and type(None) in accepted:
            return None
        if isinstance(value, (list, tuple)) and all(type(v) is int and 0 <= v < 2**63 for v in value):
            return tuple(value)
        raise TypeError(f"{name} is {value!r}; accepted: a list of whole numbers")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value!r}; accepted: what 64 bits hold")
    if float in accepted and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; accepted: a finite number")
        return float(value)
    if isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool)):
        return value
    names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); accepted: {names}")


def _check_types(config: Any, prefix: str) -> None:
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _checked(prefix + name, getattr(config, name), hint))


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


def _check_keys(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raises when a key of `values` is no field of `cls`, or a field without a default is missing."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"accepted: {', '.join(names)}"
            raise ValueError(f"{prefix + str(key)!r} is no key of a model configuration; {hint}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing = [repr(prefix + name) for name in required if name not in values]
    if missing:
        raise ValueError(f"the model configuration has no {', '.join(missing)}")


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layers (see `llmcore.layers.MoE`).

    Attributes:
        num_experts, top_k: routed experts, and how many a token takes.
        ffn_dim: inner features of one expert.
        shared_experts: experts that every token takes.
        first_dense_layers: layers at the start that keep a dense feed-forward layer of the model's `ffn_dim`.
        score: the router's score function.
        num_groups, topk_groups: a token's experts come from the best `topk_groups` of `num_groups` groups.
        renormalize: the chosen experts' weights sum to 1 (times `scale`).
        bias: of the router and of the routed experts' linear layers.
        balancing: how experts are kept in balance, with weight `aux_weight` or per-step change `bias_rate`.
    """

    num_experts: int
    top_k: int
    ffn_dim: int
    shared_experts: int = 0
    first_dense_layers: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0
    bias: bool = False
    balancing: Literal["aux_loss", "bias", "none"] = "aux_loss"
    aux_weight: float = 0.01
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        _check_types(self, "moe.")
        for name in ("num_experts", "ffn_dim", "num_groups"):
            _require(getattr(self, name) >= 1, f"moe.{name}", getattr(self, name), "1 or more")
        for name in ("shared_experts", "first_dense_layers", "aux_weight", "bias_rate"):
            _require(getattr(self, name) >= 0, f"moe.{name}", getattr(self, name), "0 or more")
        _require(
            self.num_experts % self.num_groups == 0,
            "moe.num_groups", self.num_groups, f"a divisor of moe.num_experts = {self.num_experts}",
        )  # fmt: skip
        _require(
            1 <= self.topk_groups <= self.num_groups,
            "moe.topk_groups", self.topk_groups, f"1 to moe.num_groups = {self.num_groups}",
        )  # fmt: skip
        reachable = self.num_experts // self.num_groups * self.topk_groups
        _require(
            1 <= self.top_k <= reachable,
            "moe.top_k", self.top_k, f"1 to {reachable}, the experts a token can reach",
        )  # fmt: skip
        _require(self.scale > 0, "moe.scale", self.scale, "above 0")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention in place of the usual one (see `llmcore.layers.LatentAttention`)."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        _check_types(self, "mla.")
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"mla.{name}", value, "1 or more")
        _require(self.qk_rope_head_dim % 2 == 0, "mla.qk_rope_head_dim", self.qk_rope_head_dim, "an even number")


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: a decoder (`llmcore.models.Transformer`), an encoder (`Encoder`) when not causal, or both
    (`EncoderDecoder`) with encoder_layers. Checked when made: a wrong type is a TypeError, a wrong value a ValueError;
    each names the key, the value and what would be accepted.

    Attributes:
        vocab_size, dim, num_layers, num_heads: sizes; dim is the width of the residual stream.
        num_kv_heads: key and value heads, a divisor of num_heads; None: as many as num_heads.
        head_dim: features of a head; None: dim / num_heads.
        ffn_dim: inner features of the feed-forward layer; None: 4 * dim where it has no gate, else the multiple of 64
            at or above 8/3 * dim, which has about as many weights.
        activation: "swiglu", "geglu" and "swiglu_oss" are gated (see `llmcore.layers.gated`), "gelu", GPT-2's,
            "gelu_erf", BERT's, and "relu" are not.
        norm, norm_eps, norm_bias: kind of every norm; norm_bias matters to "layer" only; "dyt" has no eps.
        norm_unit_offset: gains of RMS norms are stored as their distance from 1 (Gemma, arXiv 2403.08295).
        norm_placement: "pre" x + f(norm(x)) and a last norm; "post" norm(x + f(x)); "sandwich" x + norm(f(norm(x)))
            and a last norm; "output" x + norm(f(x)) and a last norm (OLMo 2, arXiv 2501.00656).
        qkv_bias, attention_out_bias, mlp_bias: biases of the linear layers; those of experts are moe.bias.
        position: "rope", "learned" (a table added to the embeddings), "sinusoidal" (waves added to the embeddings;
            arXiv 1706.03762), "relative" (a learned bias on the scores for each bucket of distances, shared by all
            layers; T5, arXiv 1910.10683) or "none".
        max_positions: positions the rotary or learned tables hold, and so the longest sequence.
        relative_buckets, relative_max_distance: of position "relative"; distances from the second on share a bucket.
        rope_base, rope_fraction, rope_interleaved, rope_scaling: see `llmcore.layers.RotaryEmbedding`; rope_fraction is
            the share of head_dim that is rotated.
        local_rope_base: base in layers with a window, which have no scaling then (Gemma 3, arXiv 2503.19786).
        no_rope_layers: layers without rotation (arXiv 2501.18795).
        causal: a token sees no later one. False makes it an encoder.
        encoder_layers: layers of an encoder that the decoder's layers attend to, of the same sizes; 0: none.
        token_types: kinds of tokens, told apart by a learned vector each that is added to the embeddings (BERT).
        embedding_norm: a norm on the embeddings.
        pooler: tanh of a linear layer on each sequence's first hidden state (BERT, arXiv 1810.04805).
        head: what makes logits of hidden states: the output matrix, "linear"; before it a linear layer, the activation
            and a norm, and behind it a bias, "mlm" (BERT); or "none".
        mtp_layers: modules behind a decoder that predict one token further each (`MTPModule`, arXiv 2412.19437).
        logit_scale: of an encoder-decoder: factor on the hidden states before the output matrix (T5).
        tied_embeddings: the output matrix is the embedding matrix.
        embedding_scale: factor on the token embeddings: "sqrt_dim" (Gemma, arXiv 2403.08295), or "learned", one scalar
            that starts there, which models without a norm need (arXiv 2503.10622, section 5).
        window, attention_scale, attention_softcap, attention_sinks, qk_norm, qk_norm_scope: see
            `llmcore.layers.Attention`.
        window_layers: the layers that have the window; None: all.
        logit_softcap: logits become softcap * tanh(logits / softcap).
        dropout: on the embeddings and on what each layer adds to the residual stream, while training.
        init_std: standard deviation of the initial weights.
        moe: mixture of experts in place of the feed-forward layers.
        mla: latent attention, whose sizes stand in num_kv_heads' and head_dim's place; it rotates (position "rope")
            and has neither window, softcap, sinks nor QK norm. qkv_bias is that of the matrices into the latents.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    activation: Literal["swiglu", "geglu", "swiglu_oss", "gelu", "gelu_erf", "relu"] = "swiglu"
    norm: Literal["rms", "layer", "dyt"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_unit_offset: bool = False
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    position: Literal["rope", "learned", "none", "sinusoidal", "relative"] = "rope"
    max_positions: int = 2048
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    causal: bool = True
    encoder_layers: int = 0
    token_types: int = 0
    embedding_norm: bool = False
    pooler: bool = False
    head: Literal["linear", "mlm", "none"] = "linear"
    mtp_layers: int = 0
    logit_scale: float = 1.0
    tied_embeddings: bool = True
    embedding_scale: Literal["none", "sqrt_dim", "learned"] = "none"
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "all"] = "head"
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None

    def __post_init__(self) -> None:
        for name, cls in (("moe", MoEConfig), ("mla", MLAConfig), ("rope_scaling", RopeScaling)):
            if isinstance(value := getattr(self, name), Mapping):
                _check_keys(cls, value, f"{name}.")
                object.__setattr__(self, name, cls(**value))
        _check_types(self, "")
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "max_positions"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        self._fill_in()
        for name in ("norm_eps", "rope_base", "init_std", "logit_scale"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("window", "ffn_dim", "head_dim"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("window_layers", "no_rope_layers"):
            value = getattr(self, name)
            fits = not value or (max(value) < self.num_layers and len(set(value)) == len(value))
            _require(fits, name, value, f"each layer once, 0 to num_layers - 1 = {self.num_layers - 1}")
        _require(self.window_layers is None or self.window is not None, "window_layers", self.window_layers,
                 "None without a window")  # fmt: skip
        _require(
            not self.norm_unit_offset or self.norm == "rms", "norm_unit_offset", True, "False unless norm is 'rms'"
        )
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "local_rope_base"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0, or None")
        kv_heads = self.num_kv_heads
        _require(
            kv_heads >= 1 and self.num_heads % kv_heads == 0,
            "num_kv_heads", kv_heads, f"a divisor of num_heads = {self.num_heads}",
        )  # fmt: skip
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 to below 1")
        self._check_kind()
        if self.position == "rope":
            _require(0 < self.rope_fraction <= 1, "rope_fraction", self.rope_fraction, "above 0, to 1")
            exact = self.rope_fraction * (self.head_dim if self.mla is None else self.mla.qk_rope_head_dim)
            # exact but for a rounding: 28 / 43 * 43 is not 28
            _require(
                abs(exact - self.rotary_dim) < 1e-6 and self.rotary_dim % 2 == 0 and self.rotary_dim >= 2,
                "rope_fraction * head_dim", exact, f"an even whole number (head_dim is {self.head_dim})",
            )  # fmt: skip
        if self.mla is not None:
            plain = {
                "num_kv_heads": self.num_heads, "window": None, "attention_softcap": None, "attention_sinks": False,
                "qk_norm": False, "position": "rope", "rope_fraction": 1.0,
            }  # fmt: skip
            for name, value in plain.items():
                _require(getattr(self, name) == value, name, getattr(self, name), f"{value!r} with mla")
        if self.moe is not None:
            _require(self.gated, "activation", self.activation, "'swiglu' or 'geglu' with experts")
            _require(not self.mlp_bias, "mlp_bias", self.mlp_bias, "False with experts")
            _require(
                self.moe.first_dense_layers < self.num_layers,
                "moe.first_dense_layers", self.moe.first_dense_layers, f"less than num_layers = {self.num_layers}",
            )  # fmt: skip

    def _check_kind(self) -> None:
        """What goes with a decoder, an encoder and both."""
        for name in ("encoder_layers", "token_types", "mtp_layers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.causal or not self.encoder_layers, "causal", self.causal, "True with encoder_layers")
        if self.causal:
            for name, plain in (("token_types", 0), ("pooler", False), ("embedding_norm", False)):
                _require(getattr(self, name) == plain, name, getattr(self, name), f"{plain!r} unless causal is False")
            _require(self.head == "linear", "head", self.head, "'linear' unless causal is False")
        else:
            _require(self.mla is None, "causal", False, "True with mla")
        _require(self.encoder_layers or self.logit_scale == 1, "logit_scale", self.logit_scale,
                 "1.0 without encoder_layers")  # fmt: skip
        if self.mtp_layers:
            plain = {"causal": True, "encoder_layers": 0, "norm_placement": "pre", "position": "rope"}
            plain["embedding_scale"] = "none"
            for name, value in plain.items():
                _require(getattr(self, name) == value, name, getattr(self, name), f"{value!r} with mtp_layers")
        if self.encoder_layers:
            _require(self.moe is None and self.mla is None, "encoder_layers", self.encoder_layers,
                     "0 with experts or latent attention")  # fmt: skip
        if self.position == "relative":
            least = 4 if not self.causal or self.encoder_layers else 2
            _require(self.relative_buckets >= least and self.relative_buckets % least == 0, "relative_buckets",
                     self.relative_buckets, f"a multiple of {least}")  # fmt: skip
            _require(self.relative_max_distance > self.relative_buckets // 2, "relative_max_distance",
                     self.relative_max_distance, "above relative_buckets / 2")  # fmt: skip

    def _fill_in(self) -> None:
        """Resolves the sizes that follow from others."""
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.mla is not None:
            object.__setattr__(self, "head_dim", self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim)
        if self.head_dim is None:
            _require(
                self.dim % self.num_heads == 0, "num_heads", self.num_heads,
                f"a divisor of dim = {self.dim}, unless head_dim is given",
            )  # fmt: skip
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.ffn_dim is None:
            gated = -(-8 * self.dim // (3 * 64)) * 64
            object.__setattr__(self, "ffn_dim", gated if self.gated else 4 * self.dim)

    @property
    def gated(self) -> bool:
        """Whether the activation is a product of two."""
        return "glu" in self.activation

    @property
    def position_limit(self) -> int | None:
        """Tokens of the longest sequence; None: any number."""
        return self.max_positions if self.position in ("rope", "learned") else None

    @property
    def encoder(self) -> ModelConfig:
        """Of an encoder-decoder's encoder."""
        return dataclasses.replace(
            self, causal=False, num_layers=self.encoder_layers, encoder_layers=0, head="none", logit_scale=1.0
        )

    def layer_window(self, layer: int) -> int | None:
        """The window of a layer, or None."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    @property
    def rotary_dim(self) -> int:
        """Rotated features of a head."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        return round(self.rope_fraction * self.head_dim)

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """(heads, features of a key, features of a value) that a key-value cache holds of each token and layer. Of
        latent attention the value is a part of the key."""
        if self.mla is not None:
            return 1, self.mla.kv_lora_rank + self.mla.qk_rope_head_dim, self.mla.kv_lora_rank
        return self.num_kv_heads, self.head_dim, self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration of `values`; `moe` may be a mapping.

        Raises:
            ValueError: for an unknown key, naming the nearest one, a missing key, or a wrong value.
            TypeError: for a wrong type.
        """
        _check_keys(cls, values, "")
        return cls(**values)
