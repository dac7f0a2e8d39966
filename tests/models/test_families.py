"""Every family against `transformers` in float32, on tiny random weights that go through files: config.json and
safetensors of `transformers` are read without it, and what is written back it reads bit for bit. Logits, loss, the
gradient of every weight and greedy generation over the cache are compared."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmcore.checkpoints import CheckpointError, TensorFiles
from llmcore.inference import generate
from llmcore.layers import MoE
from llmcore.models import load_pretrained, save_pretrained
from llmcore.models.families import FAMILIES, family_of
from llmcore.training.losses import next_token_loss

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

# name -> (class of transformers, its configuration's, what differs from SIZES)
CASES = {
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


def test_every_family_has_a_case():
    assert {name.split(",")[0] for name in CASES} | {"gpt2"} == FAMILIES.keys()


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
    if case == "gpt2":
        return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, attn_implementation="eager")))
    name, options = CASES[case]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**SIZES | options, attn_implementation="eager")
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config))


def their_gradients(theirs, ours, folder):
    """Their gradients under our names: rules are linear, so gradients go the way of the weights."""
    model = copy.deepcopy(theirs)
    for target, source in zip(model.parameters(), theirs.parameters()):
        target.data = torch.zeros_like(target) if source.grad is None else source.grad
    model.save_pretrained(folder)
    files, family = TensorFiles(folder), family_of(ours.config)
    return {rule.ours: rule.join([files[name] for name in rule.theirs]) for rule in family.rules(ours.config)}


@pytest.mark.parametrize("case", [*CASES, "gpt2"])
def test_parity(case, tmp_path):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert family_of(ours.config).model_type == case.split(",")[0]

    tokens = torch.randint(0, 99, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, labels=tokens)
    assert expected.logits.std() > 0.1  # a comparison of something
    torch.testing.assert_close(ours.logits(ours(tokens).hidden), expected.logits, **TOLERANCE)

    batch = SimpleNamespace(
        tokens=tokens.flatten(),
        targets=F.pad(tokens[:, 1:], (0, 1), value=-100).flatten(),
        positions=None,
        cu_seqlens=torch.tensor([0, 37, 74], dtype=torch.int32),
        max_seqlen=37,
        num_targets=72,
    )
    for block in ours.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.balancing = "none"  # their loss has no such part unless asked for
    loss = next_token_loss(ours, batch).total / 72
    torch.testing.assert_close(loss, expected.loss, **TOLERANCE)
    expected.loss.backward()
    loss.backward()
    for name, gradient in their_gradients(theirs, ours, tmp_path / "gradients").items():
        if name.endswith("expert_bias"):
            continue
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    compare_generation(theirs, ours, tokens)


def compare_generation(theirs, ours, tokens):
    """Over the cache, from a batch of uneven prompts: each token is the largest of the logits that they give to the
    whole text before it."""
    prompts = [tokens[0, 3:4].tolist(), tokens[1, :23].tolist(), tokens[0, 5:12].tolist()]
    for prompt, new in zip(prompts, generate(ours, prompts, max_tokens=12, temperature=0)):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
        best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (best - chosen).max() < 1e-4  # of two that close a rounding may choose
        assert sum(map(int.__eq__, new, logits.argmax(-1).tolist())) >= 11


@pytest.mark.parametrize("case", [*CASES, "gpt2"])
def test_saved_is_what_was_loaded(case, tmp_path):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=30_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()  # more than one shard
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)  # settings too

    once_more = load_pretrained(tmp_path / "ours")
    assert once_more.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(once_more.state_dict()[name], tensor), name


def test_hidden_states_layer_by_layer(tmp_path):
    """What to run when a family's logits differ: the first layer that is off."""
    theirs = their_model("llama, tied")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    expected = theirs(tokens, output_hidden_states=True).hidden_states[:-1]
    found = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda module, args: found.append(args[0] if args[1] is None else sum(args)))
    ours(tokens)
    for layer, pair in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(*pair, **TOLERANCE, msg=lambda m, n=layer: f"layer {n}: {m}")


def test_older_names_of_rope_settings(tmp_path):
    """config.json as transformers 4 wrote it."""
    theirs = their_model("llama, tied")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}}
    del values["rope_scaling"]["rope_theta"]
    new = load_pretrained(tmp_path).config
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_pretrained(tmp_path).config == new


def test_cast_on_loading(tmp_path):
    their_model("glm4_moe").save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head_weight.dtype == torch.bfloat16
    assert model.blocks[1].mlp.expert_bias.dtype == torch.float32
    assert model.rope.cos.dtype == torch.float32
    assert torch.isfinite(model.logits(model(torch.arange(9)[None]).hidden)).all()


def test_refuses_counts_that_no_file_has(tmp_path):
    """At once: nothing is made for them."""
    their_model("llama, tied").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for layers, message in ((2**40, "accepted: up to 16384"), (9999, r"num_layers is 9999; the file has \d+ tensors")):
        file.write_text(json.dumps(values | {"num_hidden_layers": layers}))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path)
