"""The layers that every model family shares, and the decoder of them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers import (
    Attention,
    CacheStep,
    CrossAttention,
    LatentAttention,
    Linear,
    Memory,
    MoE,
    MoEOutput,
    QuantizedEmbedding,
    QuantizedLinear,
    RelativeBias,
    RotaryEmbedding,
    make_mlp,
    make_norm,
    sinusoidal,
)
from llmcore.models.config import ModelConfig
from llmcore.models.padding import Packing


class TransformerOutput(NamedTuple):
    """hidden: (batch, seq, dim) or (total, dim), after the last norm, before the output matrix; aux_loss: scalar, the
    balancing losses of all layers, already weighted, or None; expert_load: (MoE layers, num_experts) int64, the
    (token, choice) pairs each routed expert got, or None."""

    hidden: Tensor
    aux_loss: Tensor | None
    expert_load: Tensor | None


def make_model_norm(config: ModelConfig) -> nn.Module:
    return make_norm(config.norm, config.dim, config.norm_eps, config.norm_bias, config.norm_unit_offset)


_QUANTIZED = (QuantizedEmbedding, QuantizedLinear)

# The norms of each sublayer, by the ends of their names.
_NORMS_OF_PLACEMENT = {
    "pre": ("norm",), "post": ("norm",), "sandwich": ("norm", "out_norm"), "output": ("out_norm",),
}  # fmt: skip


def _attention(c: ModelConfig, layer: int) -> nn.Module:
    if c.mla is not None:
        sizes = dataclasses.asdict(c.mla)
        return LatentAttention(c.dim, c.num_heads, **sizes, bias=c.qkv_bias, scale=c.attention_scale)
    return Attention(
        c.dim, c.num_heads, c.num_kv_heads, c.head_dim, qkv_bias=c.qkv_bias, out_bias=c.attention_out_bias,
        qk_norm=c.qk_norm, qk_norm_scope=c.qk_norm_scope, norm_eps=c.norm_eps, norm_unit_offset=c.norm_unit_offset,
        causal=c.causal, window=c.layer_window(layer), scale=c.attention_scale, softcap=c.attention_softcap,
        sinks=c.attention_sinks,
    )  # fmt: skip


class Block(nn.Module):
    """One layer: attention, in a decoder over an encoder attention to that one's output, then a feed-forward layer or
    experts.

    It carries the residual stream x as two addends (branch, residual), so that each addition happens inside the next
    norm. `residual` is None where the stream is `branch` alone.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.placement, self.layer, self.dropout = c.norm_placement, layer, c.dropout
        self.attention = _attention(c, layer)
        if c.moe is not None and layer >= c.moe.first_dense_layers:
            m = c.moe
            self.mlp = MoE(
                c.dim, m.ffn_dim, m.num_experts, m.top_k, shared_experts=m.shared_experts, activation=c.activation,
                score=m.score, num_groups=m.num_groups, topk_groups=m.topk_groups, renormalize=m.renormalize,
                scale=m.scale, bias=m.bias, balancing=m.balancing, aux_weight=m.aux_weight, bias_rate=m.bias_rate,
            )  # fmt: skip
        else:
            self.mlp = make_mlp(c.activation, c.dim, c.ffn_dim, c.mlp_bias)
        self.cross_attention = None
        sublayers = ("attention", "mlp")
        if c.encoder_layers:
            self.cross_attention = CrossAttention(
                c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.qkv_bias, out_bias=c.attention_out_bias,
                scale=c.attention_scale,
            )  # fmt: skip
            sublayers = ("attention", "cross_attention", "mlp")
        for end in _NORMS_OF_PLACEMENT[c.norm_placement]:
            for sublayer in sublayers:
                self.add_module(f"{sublayer}_{end}", make_model_norm(c))

    def forward(
        self, branch: Tensor, residual: Tensor | None, *, memory: Memory | None = None, **where
    ) -> tuple[Tensor, Tensor | None, MoEOutput | None]:
        """branch, residual: (..., dim); `memory`: of an encoder; `where`: rope, positions, cu_seqlens and so on for the
        attention."""
        branch, residual = self._enter("attention", branch, residual)
        branch = self.attention(branch, layer=self.layer, **where)
        branch, residual = self._leave("attention", branch, residual)
        if self.cross_attention is not None:
            branch, residual = self._enter("cross_attention", branch, residual)
            branch = self.cross_attention(branch, memory, self.layer)
            branch, residual = self._leave("cross_attention", branch, residual)
        branch, residual = self._enter("mlp", branch, residual)
        routed = None
        if isinstance(self.mlp, MoE):
            routed = self.mlp(branch)
            branch = routed.hidden
        else:
            branch = self.mlp(branch)
        branch, residual = self._leave("mlp", branch, residual)
        return branch, residual, routed

    def _enter(self, name: str, branch: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(input of the sublayer, residual stream)."""
        if self.placement in ("post", "output"):
            stream = branch if residual is None else branch + residual
            return stream, stream
        norm = self.get_submodule(f"{name}_norm")
        return (norm(branch), branch) if residual is None else norm(branch, residual)

    def _leave(self, name: str, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two addends of the stream after a sublayer gave `branch`."""
        if self.placement in ("sandwich", "output"):
            branch = self.get_submodule(f"{name}_out_norm")(branch)
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        if self.placement == "post":
            return self.get_submodule(f"{name}_norm")(branch, residual)[0], None
        return branch, residual


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig) -> None:
    """Weights start normal with standard deviation `init_std`; those that write to the residual stream (attention.out,
    mlp.down) with init_std / sqrt(2 * num_layers), so that its variance does not grow with depth (GPT-2). Biases and
    sinks start at 0, gains at 1. Draws come from torch's global generator."""
    std = config.init_std
    for name, parameter in model.named_parameters():
        writes_stream = name.removesuffix(".weight").endswith(("attention.out", ".down"))
        if parameter.ndim >= 2:
            parameter.normal_(std=std / (2 * config.num_layers) ** 0.5 if writes_stream else std)
        elif name.endswith(("bias", "sinks")):
            parameter.zero_()
        # else a gain, a scale or DyT's alpha: as it was made


class HasTable:
    """What a model with a table of tokens, `embed_tokens`, tells of itself."""

    @property
    def is_quantized(self) -> bool:
        """Whether `llmcore.layers.quantize_model` or a file quantised any of its weights."""
        return any(isinstance(layer, _QUANTIZED) for layer in self.modules())

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and logits."""
        table = self.embed_tokens
        return table.dtype if isinstance(table, QuantizedEmbedding) else table.weight.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the keys and values that generation does best to keep: `dtype`, but float16 beside quantised weights of a
        float32 model on the CPU. Rounding to 11 bits changes less than that of the weights and activations does, and a
        step over a long context is bound by reading them. Latent attention keeps `dtype`."""
        halves = self.dtype == torch.float32 and self.device.type == "cpu" and self.config.mla is None
        return torch.float16 if halves and self.is_quantized else self.dtype

    @property
    def device(self) -> torch.device:
        table = self.embed_tokens
        return table.device if isinstance(table, QuantizedEmbedding) else table.weight.device


class Stack(HasTable, nn.Module):
    """Layers one upon the other, from the embeddings of tokens to hidden states: all of a model but its output matrix,
    and but its token table where that is shared with another stack."""

    def __init__(self, config: ModelConfig, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config, self.embed_tokens = config, embed_tokens
        scale = torch.full((1,), config.dim**0.5)
        self.embed_scale = nn.Parameter(scale) if config.embedding_scale == "learned" else None
        learned = config.position == "learned"
        self.embed_positions = nn.Embedding(config.max_positions, config.dim) if learned else None
        self.embed_types = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.embed_norm = make_model_norm(config) if config.embedding_norm else None
        self.relative_bias = None
        if config.position == "relative":
            self.relative_bias = RelativeBias(
                config.num_heads, config.relative_buckets, config.relative_max_distance, not config.causal
            )
        self.rope = self.local_rope = None
        if config.position == "rope":
            pairs, positions = config.rope_interleaved, config.max_positions
            self.rope = RotaryEmbedding(config.rotary_dim, positions, config.rope_base, pairs, config.rope_scaling)
            if config.local_rope_base is not None:
                self.local_rope = RotaryEmbedding(config.rotary_dim, positions, config.local_rope_base, pairs)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        last = config.norm_placement != "post"
        self.norm = make_model_norm(config) if last else None

    def positions_of(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor | None:
        """The position of each token, None where they count from 0 along a row. Raises as `Transformer.forward`."""
        self._check(tokens, positions, cu_seqlens, cache)
        limit = self.config.position_limit
        if cache is not None and positions is None:
            positions = cache.positions
        elif cu_seqlens is not None and positions is None and self.config.position != "none":
            lengths = cu_seqlens.diff()
            starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=len(tokens))
            positions = torch.arange(len(tokens), device=tokens.device) - starts
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range("token id", tokens, self.config.vocab_size, "vocab_size")
            if positions is not None and limit is not None:
                _check_range("position", positions, limit, "max_positions")
        longest = max_seqlen if tokens.ndim == 1 else tokens.shape[1]
        if longest is not None and limit is not None and longest > limit:
            raise ValueError(f"a sequence has {longest} tokens; accepted: max_positions = {limit}")
        return positions

    def run(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: CacheStep | None = None,
        token_types: Tensor | None = None,
        memory: Memory | None = None,
    ) -> TransformerOutput:
        """x: the tokens' embeddings, (batch, seq, dim) or (total, dim); positions: as `positions_of` gives them."""
        branch, residual = self.embed(x, positions, token_types), None
        where = {"positions": positions, "cu_seqlens": cu_seqlens, "cache": cache, "memory": memory}
        if self.relative_bias is not None:
            where["position_bias"] = self.relative_bias()
        routed = []
        for layer, block in enumerate(self.blocks):
            branch, residual, out = block(branch, residual, rope=self.rope_of(layer), **where)
            if out is not None:
                routed.append(out)
        hidden = branch if self.norm is None else self.norm(branch, residual)[0]
        losses = [out.aux_loss for out in routed if out.aux_loss is not None]
        return TransformerOutput(
            hidden,
            torch.stack(losses).sum() if losses else None,
            torch.stack([out.expert_load for out in routed]) if routed else None,
        )

    def rope_of(self, layer: int) -> RotaryEmbedding | None:
        """What rotates the queries and keys of a layer."""
        if layer in self.config.no_rope_layers:
            return None
        local = self.local_rope is not None and self.config.layer_window(layer) is not None
        return self.local_rope if local else self.rope

    def _check(
        self, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, cache: CacheStep | None
    ) -> None:
        if cache is not None and not self.config.causal:
            raise ValueError("a cache is given; accepted: None for an encoder, whose tokens see later ones")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens has dtype {tokens.dtype}; accepted: torch.int32, torch.int64")
        packed = cu_seqlens is not None or cache is not None
        if tokens.ndim != (1 if packed else 2):
            wanted = "(total,) with cu_seqlens or cache" if packed else "(batch, seq), or (total,) with cu_seqlens"
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; accepted: {wanted}")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cu_seqlens and cache are both given; a cache has its own cu_seqlens_q")
        if positions is not None and positions.shape != tokens.shape:
            raise ValueError(f"positions has shape {tuple(positions.shape)}; accepted: {tuple(tokens.shape)}, tokens'")
        if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        offsets = cu_seqlens.tolist() if cu_seqlens.ndim == 1 and cu_seqlens.dtype == torch.int32 else []
        if offsets[:1] != [0] or offsets[-1] != len(tokens) or offsets != sorted(offsets):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens}; accepted: torch.int32 offsets rising from 0 to {len(tokens)} tokens"
            )

    def embed(self, x: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """What the first layer gets of the tokens' rows in the table, (batch, seq, dim) or (total, dim)."""
        if self.config.embedding_scale != "none":
            # rounded to the model's dtype, as Gemma was trained
            root = torch.tensor(self.config.dim**0.5, dtype=x.dtype).item()
            x = x * (root if self.embed_scale is None else self.embed_scale)
        if self.embed_positions is not None:
            rows = self.embed_positions.weight[: x.shape[-2]]
            x = x + (rows if positions is None else self.embed_positions(positions))
        if self.config.position == "sinusoidal":
            places = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
            x = x + sinusoidal(places, self.config.dim, x.dtype)
        if self.embed_types is not None:
            x = x + (self.embed_types.weight[0] if token_types is None else self.embed_types(token_types))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return F.dropout(x, self.config.dropout, self.training)


class MTPModule(nn.Module):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): from a token's hidden state and the
    embedding of a later token, a state that predicts the token after that one. Module 0 takes the main model's hidden
    states, each further one those of the module before it. Embeddings and output matrix are the main model's.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.embed_norm, self.hidden_norm = make_model_norm(config), make_model_norm(config)
        self.proj = Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, config.num_layers + depth)
        self.norm = make_model_norm(config)

    def forward(self, hidden: Tensor, embedded: Tensor, **where) -> tuple[Tensor, Tensor, MoEOutput | None]:
        """hidden, embedded: (..., dim); `where`: as of `Block`. Gives the state for the output matrix, the stream
        before its norm, which is the next module's `hidden`, and what the experts did."""
        # the embedding's half comes first, as in the published weights; the paper's equation 21 has it second
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), dim=-1))
        branch, residual, routed = self.block(x, None, **where)
        state, stream = self.norm(branch, residual)
        return state, stream, routed


class Transformer(Stack):
    """A decoder-only transformer over token ids: `model(tokens)` gives hidden states, `model.logits(hidden)` logits.
    Initial weights: `init_weights`."""

    def __init__(self, config: ModelConfig) -> None:
        if type(self) is Transformer and (not config.causal or config.encoder_layers):
            raise ValueError("the configuration is not that of a decoder alone; accepted by llmcore.models.build_model")
        super().__init__(config, nn.Embedding(config.vocab_size, config.dim))
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = None
        if config.mtp_layers:
            self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.mtp_layers))
        init_weights(self, config)

    @property
    def lm_head_weight(self) -> Tensor:
        """The output matrix, (vocab_size, dim).

        Raises:
            TypeError: when it is quantised.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if isinstance(head, _QUANTIZED):
            raise TypeError("the output matrix is quantised: it is for inference only, by way of logits()")
        return head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: CacheStep | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> TransformerOutput:
        """Hidden states of every token, each of which sees itself and earlier tokens of its own sequence (in an encoder
        later ones too).

        Args:
            tokens: integers below vocab_size: (batch, seq); or packed (total,), with cu_seqlens or cache.
            positions: integers shaped as tokens; without, each sequence (or the cache) counts on from 0.
            cu_seqlens: (documents + 1,) int32, where each packed document begins; the last entry is total.
            max_seqlen: the longest document, where it is known: compared with max_positions without a look at the data.
            cache: attends over a paged cache and extends it (see `llmcore.inference.PagedKVCache`).
            mask: of a padded batch, left or right: (batch, seq), true where a token is, or the rows' lengths, (batch,).
                Padding is not computed on; its hidden states are 0.
            token_types: integers shaped as tokens, below config.token_types; without, 0.

        Raises:
            ValueError: for a wrong shape, a token id or position that has no row in its table or offsets that don't
                cover the tokens (both looked for on the CPU only), or a sequence longer than max_positions; names
                the value.
            TypeError: for tokens that are no integers.
        """
        if mask is not None:
            return self._forward_padded(tokens, mask, positions, cu_seqlens, cache, token_types)
        positions = self.positions_of(tokens, positions, cu_seqlens, max_seqlen, cache)
        self._check_types(tokens, token_types)
        x = self.embed_tokens(tokens)
        return self.run(x, positions=positions, cu_seqlens=cu_seqlens, cache=cache, token_types=token_types)

    def _forward_padded(self, tokens, mask, positions, cu_seqlens, cache, token_types) -> TransformerOutput:
        if cu_seqlens is not None or cache is not None or tokens.ndim != 2:
            raise ValueError("a mask is given; accepted with (batch, seq) tokens, without cu_seqlens and cache")
        packing = Packing.of(mask, tuple(tokens.shape))
        packed = [None if t is None else packing.pack(t) for t in (tokens, positions, token_types)]
        out = Transformer.forward(
            self, packed[0], positions=packed[1], token_types=packed[2], cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
        )  # fmt: skip
        return out._replace(hidden=packing.unpack(out.hidden))

    def _check_types(self, tokens: Tensor, token_types: Tensor | None) -> None:
        if token_types is None:
            return
        if token_types.shape != tokens.shape or self.embed_types is None:
            kinds = self.config.token_types
            raise ValueError(
                f"token_types has shape {tuple(token_types.shape)} in a model of {kinds}; accepted: "
                + (f"{tuple(tokens.shape)}, tokens'" if kinds else "None")
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range("token type", token_types, self.config.token_types, "token_types")

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., dim) -> logits (..., vocab_size), in hidden's dtype."""
        if isinstance(self.lm_head, QuantizedLinear):
            logits = self.lm_head(hidden)
        elif self.lm_head is None and isinstance(self.embed_tokens, QuantizedEmbedding):
            logits = self.embed_tokens.project(hidden)
        else:
            logits = ops.linear(hidden, self.lm_head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def look_ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> list[TransformerOutput]:
        """What the multi-token-prediction modules make of `forward`'s hidden states: in the k-th output, k from 1, the
        hidden state at token i is for the logits of token i + k + 1 of its sequence. The last k of a sequence mean
        nothing: the tokens that they would look at are not there.

        Args:
            hidden: (batch, seq, dim), or packed (total, dim); the other arguments are those that `forward` had.
        """
        positions = self.positions_of(tokens, positions, cu_seqlens, max_seqlen)
        outputs, stream = [], hidden
        for depth, module in enumerate(self.mtp or (), 1):
            ahead = F.pad(tokens[..., depth:], (0, min(depth, tokens.shape[-1])))
            where = {"rope": self.rope, "positions": positions, "cu_seqlens": cu_seqlens, "cache": None}
            state, stream, routed = module(stream, self.embed_tokens(ahead), **where)
            outputs.append(
                TransformerOutput(
                    state,
                    None if routed is None else routed.aux_loss,
                    None if routed is None else routed.expert_load[None],
                )
            )
        return outputs

    def update_expert_bias(self, expert_load: Tensor) -> None:
        """Moves the experts' choice biases toward balance; does nothing unless moe.balancing is "bias".

        Args:
            expert_load: (MoE layers, num_experts), `TransformerOutput.expert_load` added up over an optimizer step;
                those of `look_ahead` may follow.
        """
        layers = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        if self.config.moe is None or self.config.moe.balancing != "bias":
            return
        if len(expert_load) > len(layers):
            layers += [module.block.mlp for module in self.mtp or ()]
        if expert_load.shape != (wanted := (len(layers), self.config.moe.num_experts)):
            raise ValueError(f"expert_load has shape {tuple(expert_load.shape)}; accepted: {wanted}")
        for layer, load in zip(layers, expert_load):
            layer.update_expert_bias(load)

    def num_parameters(self, active: bool = False) -> int:
        """How many parameters there are, a tied matrix counted once; with `active`, those one token's pass uses: of
        routed experts only its own, of the lookup tables and of multi-token prediction none."""
        count = sum(p.numel() for p in self.parameters())
        count += sum(layer.num_weights for layer in self.modules() if isinstance(layer, _QUANTIZED))
        if not active:
            return count
        moe = self.config.moe
        for block in self.blocks:
            if isinstance(block.mlp, MoE):
                routed = block.mlp.gate_up.numel() + block.mlp.down.numel()
                count -= routed // moe.num_experts * (moe.num_experts - moe.top_k)
        count -= sum(p.numel() for p in self.mtp.parameters()) if self.mtp is not None else 0
        tables = [self.embed_positions, self.embed_tokens if self.lm_head is not None else None]
        return count - sum(table.num_embeddings * table.embedding_dim for table in tables if table is not None)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of training (forward and backward) per token of sequences of `seq_len` tokens.

        6 for each active parameter (PaLM, arXiv 2204.02311, appendix B), and 12 * num_heads * head_dim per layer for
        each key a token sees. Here a key counts only where the causal mask and window let it be seen.
        """
        c = self.config
        keys = 0.0
        for layer in range(c.num_layers):
            reach = min(c.layer_window(layer) or seq_len, seq_len)
            keys += reach - reach * (reach - 1) / (2 * seq_len)  # mean over the sequence of min(i + 1, reach)
        return 6 * self.num_parameters(active=True) + 12 * c.num_heads * c.head_dim * keys


def _check_range(what: str, values: Tensor, limit: int, limit_name: str) -> None:
    if not values.numel():
        return
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        index = tuple((values == bad).nonzero()[0].tolist())
        raise ValueError(f"{what} {bad} at index {index}; accepted: 0 to {limit_name} - 1 = {limit - 1}")
