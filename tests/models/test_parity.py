"""Hidden layers, logits and gradients equal those of `transformers` for the same random weights, in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore.models import Transformer, gpt2, llama, llama_moe

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


def compare(theirs, ours, weights):
    """`weights`: our state dict out of theirs. Compares logits and the gradient of the loss by every weight."""
    ours.load_state_dict(weights(theirs.state_dict()))
    ours.eval()
    tokens = torch.randint(0, ours.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    logits = ours.logits(ours(tokens).hidden)
    assert expected.std() > 0.1  # a comparison of something
    torch.testing.assert_close(logits, expected, **TOLERANCE)

    for out in (expected, logits):
        F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    for name, gradient in weights(their_gradients).items():
        if name != "lm_head.weight" or not ours.config.tied_embeddings:
            torch.testing.assert_close(
                ours.get_parameter(name).grad, gradient, **TOLERANCE, msg=lambda m, n=name: n + m
            )


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
            continue
        gate_up = [state[f"{theirs}mlp.{p}_proj.weight"] for p in ("gate", "up")]
        new[f"{ours}mlp.gate_up.weight"] = torch.cat(gate_up)
        new[f"{ours}mlp.down.weight"] = state[f"{theirs}mlp.down_proj.weight"]
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


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=("mha", "gqa", "mqa"))
def test_llama(kv_heads):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=False)
    theirs = randomise(transformers.LlamaForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=kv_heads, tied_embeddings=False))
    compare(theirs, ours, llama_weights)


def test_qwen2():
    """Llama with a QKV bias and another rotary base."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=rope, use_sliding_window=False
    )
    theirs = randomise(transformers.Qwen2ForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=2, tied_embeddings=False, qkv_bias=True, rope_base=1e6))
    compare(theirs, ours, llama_weights)


def test_qwen3_moe():
    """Mixture of experts, with QK norm and a head size of its own."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, norm_topk_prob=True,
    )  # fmt: skip
    theirs = randomise(transformers.Qwen3MoeForCausalLM(config))
    moe = {"num_experts": 6, "top_k": 2, "ffn_dim": 24, "shared_experts": 0, "first_dense_layers": 0}
    ours = Transformer(
        llama_moe("tiny", **OURS, num_kv_heads=2, head_dim=16, qk_norm=True, tied_embeddings=False, moe=moe)
    )
    compare(theirs, ours, llama_weights)


def test_mistral_window():
    config = transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=False, sliding_window=5, attn_implementation="eager"
    )
    theirs = randomise(transformers.MistralForCausalLM(config))
    ours = Transformer(llama("tiny", **OURS, num_kv_heads=2, tied_embeddings=False, window=5))
    compare(theirs, ours, llama_weights)


def gpt2_weights(state):
    names = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight"}
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


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    ours = Transformer(gpt2("tiny", vocab_size=99, dim=32, num_layers=3, num_heads=4, max_positions=64))
    compare(theirs, ours, gpt2_weights)


def test_gemma2_like_softcaps_and_sandwich_norms():
    """Gemma 2: norms before and after each sublayer, GEGLU, capped attention and output logits, a fixed scale."""
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=64,
        attn_implementation="eager", attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        layer_types=["full_attention"] * 3,
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

    # its norms multiply by 1 + weight
    ours_state = {
        name: tensor + 1 if "norm" in name else tensor for name, tensor in weights(theirs.state_dict()).items()
    }
    ours.load_state_dict(ours_state)
    tokens = torch.randint(0, 99, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours.logits(ours(tokens).hidden), expected, **TOLERANCE)
