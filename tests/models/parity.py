"""What the parity tests share: tiny random models of `transformers`, one for each variant of a family."""

from __future__ import annotations

import copy

import pytest
import torch

from llmcore.checkpoints import TensorFiles
from llmcore.models import load_pretrained
from llmcore.models.families import family_of

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GLM4 = {
    "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
}  # fmt: skip
DEEPSEEK = GLM4 | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": 0}
BERT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "type_vocab_size": 3,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip

# name -> (class of transformers, what differs from SIZES)
DECODERS = {
    "llama, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama, multi-query": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, biases and linear scaling": (
        "Llama",
        HEAD | {
            "attention_bias": True, "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral": ("Mistral", HEAD | {"sliding_window": 5}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", HEAD | {"rope_parameters": YARN}),
    "glm": ("Glm", HEAD | {"attention_bias": True}),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", HEAD | {
        "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3_text": ("Gemma3", HEAD | {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    }),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "sliding_window": 9, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", HEAD | EXPERTS | {"num_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe, weights as they come": ("Qwen3Moe", HEAD | EXPERTS | {"num_experts": 6, "norm_topk_prob": False}),
    "glm4_moe": ("Glm4Moe", HEAD | GLM4),
    "glm4_moe, norms and biases": ("Glm4Moe", HEAD | GLM4 | {"use_qk_norm": True, "attention_bias": True}),
    "gpt_oss": ("GptOss", HEAD | {
        "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    }),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"topk_method": "group_limited_greedy", "rope_parameters": MSCALE}),
    "deepseek_v2, as Lite": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | {"rope_parameters": MSCALE}),
}  # fmt: skip

DECODERS_AND_GPT2 = [*DECODERS, "gpt2"]

# name -> (class of transformers, its configuration's class, its options)
OTHERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertModel", "BertConfig", BERT),
    "bert, masked tokens": ("BertForMaskedLM", "BertConfig", BERT | {"hidden_act": "gelu_new"}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5, gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5, encoder": ("T5EncoderModel", "T5Config", T5),
}


def randomise(model):
    """Larger than initial weights, gains away from 1 and biases away from 0, so that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
            if parameter.ndim == 1:
                parameter.add_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.eval()


def their_model(case):
    if case in OTHERS:
        name, config_name, options = OTHERS[case]
    else:
        name, more = DECODERS[case]
        options = SIZES | more
        name, config_name = f"{name}ForCausalLM", f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**options, attn_implementation="eager")
    return randomise(getattr(transformers, name)(config))


def their_gradients(theirs, ours, folder):
    """Their gradients under our names: rules are linear, so gradients go the way of the weights."""
    model = copy.deepcopy(theirs)
    for target, source in zip(model.parameters(), theirs.parameters()):
        target.data = torch.zeros_like(target) if source.grad is None else source.grad
    model.save_pretrained(folder)
    files, family = TensorFiles(folder), family_of(ours.config)
    names = {name: name for name in files}
    if family.body and not any(name.startswith(family.body) for name in files):
        names = {family.body + name: name for name in files}
    return {rule.ours: rule.join([files[names[name]] for name in rule.theirs]) for rule in family.rules(ours.config)}


def load_both(case, folder):
    """Their model, and ours out of the folder that it was saved in."""
    theirs = their_model(case)
    theirs.save_pretrained(folder)
    ours = load_pretrained(folder)
    assert family_of(ours.config).model_type == case.split(",")[0]
    return theirs, ours


def some_tokens(rows, length):
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def padded_batch(lengths, side):
    """Rows of random tokens of those lengths with padding on one side: (tokens, mask)."""
    width = max(lengths)
    tokens = some_tokens(len(lengths), width)
    place = torch.arange(width)
    lengths = torch.tensor(lengths)[:, None]
    mask = place >= width - lengths if side == "left" else place < lengths
    return tokens, mask


def hidden_states(model, run):
    """What each block of our `model` is given while `run()` runs."""
    found = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: found.append(args[0] if args[1] is None else sum(args)))
        for block in model.blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def assert_logits(theirs, ours, tokens):
    """Logits to the tolerance; where they differ, the error names the first layer whose input does."""
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        assert expected.logits.std() > 0.1  # a comparison of something
        try:
            torch.testing.assert_close(ours.logits(ours(tokens).hidden), expected.logits, **TOLERANCE)
        except AssertionError as error:
            found = hidden_states(ours, lambda: ours(tokens))
            pairs = zip(found, expected.hidden_states)
            off = [layer for layer, pair in enumerate(pairs) if not torch.allclose(*pair, **TOLERANCE)]
            where = f"first in the input of layer {off[0]}" if off else "behind the last layer"
            raise AssertionError(f"logits differ, {where}: {error}") from None
