"""Logits, training loss, gradients and greedy generation equal those of `transformers` for the same random weights,
in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmcore.inference import generate
from llmcore.layers import Attention, MoE
from llmcore.models import Transformer, gpt2, llama, llama_moe
from llmcore.training.losses import next_token_loss

transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def randomise(model):
    """Larger than initial weights, gains away from 1 and biases away from 0, so that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def compare(theirs, ours, weights, adjust=lambda model: None):
    """`weights`: our state dict out of theirs. Compares logits, the loss that training takes (on the rows packed into
    one) with the gradient of every weight, and greedy generation from a batch of uneven prompts."""
    ours.load_state_dict(weights(theirs.state_dict()))
    adjust(ours)
    ours.eval()
    tokens = torch.randint(0, ours.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, labels=tokens)
    logits = ours.logits(ours(tokens).hidden)
    assert expected.logits.std() > 0.1  # a comparison of something
    torch.testing.assert_close(logits, expected.logits, **TOLERANCE)

    batch = SimpleNamespace(
        tokens=tokens.flatten(),
        targets=F.pad(tokens[:, 1:], (0, 1), value=-100).flatten(),
        positions=None,
        cu_seqlens=torch.tensor([0, 37, 74], dtype=torch.int32),
        max_seqlen=37,
        num_targets=72,
    )
    loss = next_token_loss(ours, batch).total / 72
    torch.testing.assert_close(loss, expected.loss, **TOLERANCE)
    expected.loss.backward()
    loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    for name, gradient in weights(their_gradients).items():
        if name != "lm_head.weight" or not ours.config.tied_embeddings:
            torch.testing.assert_close(
                ours.get_parameter(name).grad, gradient, **TOLERANCE, msg=lambda m, n=name: n + m
            )
    compare_generation(theirs, ours, tokens)


def compare_generation(theirs, ours, tokens):
    prompts = [tokens[0, 3:4].tolist(), tokens[1, :23].tolist(), tokens[0, 5:12].tolist()]
    theirs.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts:
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        best, second = torch.cat(out.scores).topk(2).values.T
        assert (best - second).min() > 1e-4  # no two logits so close that a rounding may swap them
        expected.append(out.sequences[0, len(prompt) :].tolist())
    assert generate(ours, prompts, max_tokens=12, temperature=0) == expected


def llama_weights(state):
    new = {"embed_tokens.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        new["lm_head.weight"] = state["lm_head.weight"]
    for i in range(sum(name.endswith("o_proj.weight") for name in state)):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        names = [f"{theirs}self_attn.{p}_proj." for p in "qkv"]
        for kind in ("weight", "bias"):
            if names[0] + kind in state:
                new[f"{ours}attention.qkv.{kind}"] = torch.cat([state[name + kind] for name in names])
        new[f"{ours}attention.out.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        if f"{theirs}self_attn.q_norm.weight" in state:
            for p in "qk":
                new[f"{ours}attention.{p}_norm.weight"] = state[f"{theirs}self_attn.{p}_norm.weight"]
        new[f"{ours}attention_norm.weight"] = state[f"{theirs}input_layernorm.weight"]
        new[f"{ours}mlp_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        if f"{theirs}mlp.gate.weight" in state:
            new[f"{ours}mlp.router.weight"] = state[f"{theirs}mlp.gate.weight"]
            new[f"{ours}mlp.gate_up"] = state[f"{theirs}mlp.experts.gate_up_proj"]
            new[f"{ours}mlp.down"] = state[f"{theirs}mlp.experts.down_proj"]
            if f"{theirs}mlp.gate.e_score_correction_bias" in state:
                new[f"{ours}mlp.expert_bias"] = state[f"{theirs}mlp.gate.e_score_correction_bias"]
        for their_mlp, our_mlp in (("mlp.shared_experts", "mlp.shared"), ("mlp", "mlp")):
            if f"{theirs}{their_mlp}.down_proj.weight" not in state:
                continue
            if (fused := f"{theirs}{their_mlp}.gate_up_proj.weight") in state:
                gate_up = state[fused]
            else:
                gate_up = torch.cat([state[f"{theirs}{their_mlp}.{p}_proj.weight"] for p in ("gate", "up")])
            new[f"{ours}{our_mlp}.gate_up.weight"] = gate_up
            new[f"{ours}{our_mlp}.down.weight"] = state[f"{theirs}{their_mlp}.down_proj.weight"]
    return new


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
OURS = {"vocab_size": 99, "dim": 32, "ffn_dim": 56, "num_layers": 3, "num_heads": 4, "max_positions": 64}


@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=("mha", "gqa", "mqa"))
def test_llama(kv_heads, tied):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    theirs = randomise(transformers.LlamaForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=kv_heads, tied_embeddings=tied))

    def weights(state):
        return llama_weights({k: v for k, v in state.items() if k != "lm_head.weight" or not tied})

    compare(theirs, ours, weights)


def test_qwen2():
    """Llama with a QKV bias and another rotary base."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=rope, use_sliding_window=False
    )
    theirs = randomise(transformers.Qwen2ForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=2, tied_embeddings=False, qkv_bias=True, rope_base=1e6))
    compare(theirs, ours, llama_weights)


def test_glm():
    """Rotary pairs side by side, over half of each head."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = transformers.GlmConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, rope_parameters=rope, pad_token_id=None, eos_token_id=0
    )
    theirs = randomise(transformers.GlmForCausalLM(config))
    options = {"qkv_bias": True, "rope_fraction": 0.5, "rope_interleaved": True, "tied_embeddings": False}
    compare(theirs, Transformer(llama("tiny", **OURS, num_kv_heads=2, head_dim=16, **options)), llama_weights)


NO_SHARED = {"shared_experts": 0, "first_dense_layers": 0}


def test_qwen3_moe():
    """Mixture of experts, with QK norm and a head size of its own."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, norm_topk_prob=True,
    )  # fmt: skip
    theirs = randomise(transformers.Qwen3MoeForCausalLM(config))
    moe = NO_SHARED | {"num_experts": 6, "top_k": 2, "ffn_dim": 24, "balancing": "none"}
    ours = Transformer(
        llama_moe("tiny", **OURS, num_kv_heads=2, head_dim=16, qk_norm=True, tied_embeddings=False, moe=moe)
    )
    compare(theirs, ours, llama_weights)


def test_mixtral():
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=False, num_local_experts=6, num_experts_per_tok=2,
        rope_parameters=rope, sliding_window=None,
    )  # fmt: skip
    theirs = randomise(transformers.MixtralForCausalLM(config))
    moe = NO_SHARED | {"num_experts": 6, "top_k": 2, "ffn_dim": 56, "balancing": "none"}
    ours = Transformer(llama_moe("tiny", **OURS, rope_base=1e6, tied_embeddings=False, moe=moe))
    compare(theirs, ours, llama_weights)


def test_auxiliary_loss_of_mixtral():
    """Theirs counts a token once per choice, so that it is top_k in balance, where ours is 1."""
    torch.manual_seed(0)
    layer = MoE(16, 12, 6, 2, aux_weight=1.0)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 37, 16)
    logits = layer.router(x.flatten(0, 1))
    expected = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func((logits,), 6, top_k=2) / 2
    loss = layer(x).aux_loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    gradients = [torch.autograd.grad(value, layer.router.weight)[0] for value in (loss, expected)]
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_glm4_moe():
    """Sigmoid scores, a bias in the choice, groups of experts, shared experts and a dense first layer, as in
    DeepSeek-V3."""
    config = transformers.Glm4MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        moe_intermediate_size=24, n_group=4, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=1,
    )  # fmt: skip
    theirs = randomise(transformers.Glm4MoeForCausalLM(config))
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.2)
    moe = {
        "num_experts": 8, "top_k": 3, "ffn_dim": 24, "shared_experts": 2, "first_dense_layers": 1, "score": "sigmoid",
        "num_groups": 4, "topk_groups": 2, "scale": 2.5, "balancing": "bias",
    }  # fmt: skip
    options = {"head_dim": 16, "rope_fraction": 0.5, "tied_embeddings": False, "moe": moe}
    compare(theirs, Transformer(llama_moe("tiny", **OURS, num_kv_heads=2, **options)), llama_weights)


def test_gpt_oss_attention_sinks():
    config = transformers.GptOssConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="eager"
    )
    module = transformers.models.gpt_oss.modeling_gpt_oss.GptOssAttention(config, layer_idx=1)
    theirs = randomise(module)
    ours = Attention(32, 4, 2, 16, qkv_bias=True, out_bias=True, sinks=True)
    state = theirs.state_dict()
    ours.load_state_dict(
        {f"qkv.{kind}": torch.cat([state[f"{p}_proj.{kind}"] for p in "qkv"]) for kind in ("weight", "bias")}
        | {f"out.{kind}": state[f"o_proj.{kind}"] for kind in ("weight", "bias")}
        | {"sinks": state["sinks"]}
    )
    x = torch.randn(2, 19, 32)
    unrotated = torch.ones(2, 19, 8), torch.zeros(2, 19, 8)
    mask = torch.full((19, 19), float("-inf")).triu(1)
    expected, _ = theirs(x, position_embeddings=unrotated, attention_mask=mask[None, None])
    torch.testing.assert_close(ours(x), expected, **TOLERANCE)
    seed = torch.randn(2, 19, 32)
    pair = torch.autograd.grad(expected, theirs.sinks, seed) + torch.autograd.grad(ours(x), ours.sinks, seed)
    torch.testing.assert_close(pair[1], pair[0], **TOLERANCE)


def test_mistral_window():
    config = transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=False, sliding_window=5, attn_implementation="eager"
    )
    theirs = randomise(transformers.MistralForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=2, tied_embeddings=False, window=5))
    compare(theirs, ours, llama_weights)


def gpt_weights(state):
    """Of GPT-2 and of GPT-1, whose embeddings have other names."""
    names = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight"}
    names |= {"tokens_embed.weight": "embed_tokens.weight", "positions_embed.weight": "embed_positions.weight"}
    inner = {
        "ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }  # fmt: skip
    new = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight":
            continue
        if name.startswith("h."):
            _, i, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            tensor = tensor.T if ".c_" in rest and kind == "weight" else tensor  # its Conv1D is a transposed Linear
            name = f"blocks.{i}.{inner[module]}.{kind}"
        new[names.get(name, name.replace("ln_f", "norm"))] = tensor
    return new


GPT_SIZES = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
OUR_GPT_SIZES = {"vocab_size": 99, "dim": 32, "num_layers": 3, "num_heads": 4, "max_positions": 64}


def test_gpt2():
    theirs = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT_SIZES, eos_token_id=0)))
    compare(theirs, Transformer(gpt2("tiny", **OUR_GPT_SIZES)), gpt_weights)


def test_gpt1_with_norms_after_the_residual():
    theirs = randomise(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT_SIZES)))
    compare(theirs, Transformer(gpt2("tiny", **OUR_GPT_SIZES, norm_placement="post")), gpt_weights)


def test_gemma2_like_softcaps_and_sandwich_norms():
    """Gemma 2: norms before and after each sublayer, GEGLU, capped attention and output logits, a fixed scale."""
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=64,
        attn_implementation="eager", attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        layer_types=["full_attention"] * 3, pad_token_id=None,
    )  # fmt: skip
    theirs = randomise(transformers.Gemma2ForCausalLM(config))
    ours = Transformer(
        llama(
            "tiny",
            **OURS,
            num_kv_heads=2,
            head_dim=16,
            norm_placement="sandwich",
            activation="geglu",
            attention_softcap=2.0,
            logit_softcap=3.0,
            attention_scale=24**-0.5,
            embedding_scale="sqrt_dim",
        )
    )

    def weights(state):
        new = llama_weights({k: v for k, v in state.items() if k != "lm_head.weight"})
        for i in range(3):
            theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
            new[f"{ours}attention_out_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
            new[f"{ours}mlp_norm.weight"] = state[f"{theirs}pre_feedforward_layernorm.weight"]
            new[f"{ours}mlp_out_norm.weight"] = state[f"{theirs}post_feedforward_layernorm.weight"]
        return new

    def one_more(model):
        """Its norms multiply by 1 + weight; a gain has the same gradient in both forms."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(1)

    compare(theirs, ours, weights, adjust=one_more)
