"""Models in GGUF files. Tiny models of `transformers` are put into files by the `gguf` package, under the names of its
own map, as llama.cpp's conversion does it; what we read from them must give the logits of `transformers`."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from llmcore.checkpoints import CheckpointError
from llmcore.checkpoints.gguf import GGUFFile
from llmcore.inference.save_gguf import save_gguf
from llmcore.layers import Linear, QuantizedEmbedding, QuantizedLinear
from llmcore.models import gpt2, llama, load_pretrained
from llmcore.models.gguf import load_gguf
from llmcore.models.gguf_export import same_for_inference
from llmcore.models.transformer import Transformer
from llmcore.ops import RopeScaling
from llmcore.tokenizers import train_tokenizer
from tests.models.parity import DECODERS as CASES
from tests.models.parity import their_model

gguf = pytest.importorskip("gguf")

# case of test_families -> architecture, whether its q and k are permuted, its metadata beyond the common ones
ARCHITECTURES = {
    "llama, tied": ("llama", True, {}),
    "llama, multi-query": ("llama", True, {}),
    "smollm3": ("smollm3", True, {}),
    "qwen2": ("qwen2", False, {}),
    "qwen3": ("qwen3", False, {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
    }),
    "olmo2": ("olmo2", False, {}),
    "gemma2": ("gemma2", False, {
        "attention.sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3_text": ("gemma3", False, {
        "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }),
    "mixtral": ("llama", True, {"expert_count": 6, "expert_used_count": 2}),
    "qwen3_moe": ("qwen3moe", False, {
        "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 24,
    }),
    "gpt2": ("gpt2", False, {"attention.layer_norm_epsilon": 1e-5}),
    "gpt_oss": ("gpt-oss", False, {
        "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 56, "attention.sliding_window": 8,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
    }),
    "deepseek_v2, as Lite": ("deepseek2", False, {
        "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 24, "expert_shared_count": 2,
        "expert_weights_scale": 2.5, "leading_dense_block_count": 1, "attention.kv_lora_rank": 16,
        "rope.dimension_count": 8, "attention.key_length": 24, "attention.value_length": 12,
        "expert_weights_norm": False,
    }),
    "deepseek_v3": ("deepseek2", False, {
        "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 24, "expert_shared_count": 2,
        "expert_weights_scale": 2.5, "leading_dense_block_count": 1, "attention.kv_lora_rank": 16,
        "attention.q_lora_rank": 24, "rope.dimension_count": 8, "attention.key_length": 24,
        "attention.value_length": 12, "expert_weights_norm": True, "expert_gating_func": 2,
        "expert_group_count": 4, "expert_group_used_count": 2,
    }),
}  # fmt: skip
# where the case of test_families has what no file can say
CHANGES = {
    "gemma2": {"query_pre_attn_scalar": 16}, 
    "gemma3_text": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": {}, "deepseek_v2, as Lite": {"attention_bias": False}, "deepseek_v3": {"rope_parameters": None},
    "gpt2": {}, "mixtral": {"sliding_window": None},
}  # fmt: skip


def make_theirs(case, tmp_path, monkeypatch):
    changes = {name: value for name, value in CHANGES.get(case, {}).items() if value is not None}
    dropped = {name for name, value in CHANGES.get(case, {}).items() if value is None}
    if case in CASES:
        name, options = CASES[case]
        options = {k: v for k, v in (options | changes).items() if k not in dropped}
        monkeypatch.setitem(CASES, case, (name, options))
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs


def permuted(array, heads):
    """As llama.cpp's conversion does it."""
    shape = array.shape
    return array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def converted(theirs, arch, permute):
    """Their tensors, as arrays under the names of the file."""
    config = theirs.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    state = {name: tensor.detach().float().numpy() for name, tensor in theirs.state_dict().items()}
    tied = config.tie_word_embeddings
    result, experts = {}, {}
    for name, array in state.items():
        if (name == "lm_head.weight" and tied) or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)_proj\.weight", name):
            experts.setdefault((int(match[1]), match[3]), {})[int(match[2])] = array
            continue
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?$", name):
            layer, parts, ending = match[1], match[2], "bias" if match[3] else "weight"
            if arch == "gpt-oss":  # gates and ups in turns, and matrices the other way round
                array = array if match[3] else array.swapaxes(1, 2)
                halves = {"gate": array[:, 0::2], "up": array[:, 1::2]}
            else:
                halves = dict(zip(("gate", "up"), np.split(array, 2, axis=1)))
            for part, value in (halves if parts == "gate_up" else {"down": array}).items():
                result[f"blk.{layer}.ffn_{part}_exps.{ending}"] = value
            continue
        if permute and name.endswith(("q_proj.weight", "q_proj.bias")):
            array = permuted(array, config.num_attention_heads)
        if permute and name.endswith(("k_proj.weight", "k_proj.bias")):
            array = permuted(array, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name.endswith("sinks"):
            name += ".weight"
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        result[found] = array
    for (layer, part), arrays in experts.items():
        result[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([arrays[i] for i in range(len(arrays))])
    return result


def llama3_divisors(config):
    """As llama.cpp's conversion computes rope_freqs.weight."""
    p = config.rope_parameters
    low = p["original_max_position_embeddings"] / p["low_freq_factor"]
    high = p["original_max_position_embeddings"] / p["high_freq_factor"]
    dim, factors = config.hidden_size // config.num_attention_heads, []
    for frequency in 1.0 / p["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(p["factor"])
        else:
            smooth = (p["original_max_position_embeddings"] / wavelength - p["low_freq_factor"]) / (
                p["high_freq_factor"] - p["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write(path, arch, config, tensors, more, kinds=None):
    """A file by the gguf package; `kinds` maps names to quantised formats."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": config.num_hidden_layers, "context_length": 64, "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
    }  # fmt: skip
    if arch != "gpt2":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        rope = config.rope_parameters
        if "rope_theta" in rope:
            values["rope.freq_base"] = float(rope["rope_theta"])
        values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    for name, value in (values | more).items():
        kind = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
        getattr(writer, kind)(f"{arch}.{name}", value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_parity(case, tmp_path, monkeypatch):
    arch, permute, more = ARCHITECTURES[case]
    theirs = make_theirs(case, tmp_path, monkeypatch)
    tensors = converted(theirs, arch, permute)
    if (getattr(theirs.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(theirs.config)
    write(tmp_path / "model.gguf", arch, theirs.config, tensors, more)
    ours = load_gguf(tmp_path / "model.gguf")
    assert same_for_inference(load_pretrained(tmp_path / "theirs").config, ours.config)
    tokens = torch.randint(0, 99, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(ours(tokens).hidden), expected, rtol=1e-4, atol=1e-5)


def tiny(family="llama, tied", **changes):
    """A model of a family with weights away from 0, and a tokenizer."""
    config = {
        "llama, tied": llama("tiny", vocab_size=300),
        "llama, untied": llama("tiny", vocab_size=300, tied_embeddings=False, num_kv_heads=2),
        "gpt2": gpt2("tiny", vocab_size=300),
    }[family]
    torch.manual_seed(3)
    model = Transformer(dataclasses.replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    text = [f"the {a} {b} over {c}\n" for a in ("quick", "lazy") for b in ("fox", "dog") for c in ("me", "you")]
    return model, train_tokenizer(text * 5, vocab_size=300)


LLAMA3 = RopeScaling("llama3", 8.0, 32, 1.0, 4.0)


@pytest.mark.parametrize("format_", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama, tied", {}), ("llama, untied", {"rope_scaling": LLAMA3}), ("gpt2", {})],
    ids=["tied", "untied", "gpt2"],
)
def test_save_and_load(family, changes, format_, tmp_path):
    """Every number comes back as its format rounds it, and the second time bit for bit."""
    model, tokenizer = tiny(family, **changes)
    save_gguf(model, tokenizer, tmp_path / "a.gguf", format=format_)
    again = load_gguf(tmp_path / "a.gguf", dtype=torch.float32)
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.format("blk.0.ffn_down.weight") == format_
    assert {file.format(name) for name in file if "norm" in name} == {"f32"}
    assert same_for_inference(model.config, again.config)
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        steps = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 8}
        error = (loaded - saved).abs().max() / saved.abs().max()
        assert error <= steps[format_], name
    save_gguf(again, tokenizer, tmp_path / "b.gguf", format="bf16" if format_ == "bf16" else "f16")
    if format_ in ("f16", "bf16"):
        third = load_gguf(tmp_path / "b.gguf", dtype=torch.float32)
        assert all(map(torch.equal, again.state_dict().values(), third.state_dict().values()))
        default = load_gguf(tmp_path / "b.gguf")
        assert default.lm_head_weight.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[format_]


@pytest.mark.parametrize("family", ["llama, tied", "llama, untied", "gpt2"])
def test_llama_cpp_computes_the_same(family, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = tiny(family)
    save_gguf(model, tokenizer, tmp_path / "a.gguf", format="f16")
    ours = load_gguf(tmp_path / "a.gguf", dtype=torch.float32)
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = tokenizer.encode("the quick fox over you")
    assert theirs.tokenize(b"the quick fox over you", add_bos=False) == ids
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    torch.testing.assert_close(ours.logits(ours(torch.tensor([ids])).hidden[0]), expected, rtol=0, atol=0.01)
    assert expected.std() > 0.3


def test_quantised_rows_move_whole(tmp_path, monkeypatch):
    """A file in blocks gives what a float file with the numbers of those blocks gives: q and k come back in order."""
    monkeypatch.setitem(CASES, "llama, tied", ("Llama", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}))
    theirs = make_theirs("llama, tied", tmp_path, monkeypatch)
    tensors = converted(theirs, "llama", True)
    formats = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    kinds = {
        name: gguf.GGMLQuantizationType[formats[i % len(formats)]]
        for i, (name, array) in enumerate(tensors.items()) if array.ndim == 2
    }  # fmt: skip
    write(tmp_path / "blocks.gguf", "llama", theirs.config, tensors, {}, kinds)
    for name, kind in kinds.items():
        tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
    write(tmp_path / "floats.gguf", "llama", theirs.config, tensors, {})
    blocks, floats = load_gguf(tmp_path / "blocks.gguf", dtype=torch.float32), load_gguf(tmp_path / "floats.gguf")
    assert not blocks.is_quantized
    assert all(map(torch.equal, blocks.state_dict().values(), floats.state_dict().values()))

    kept = load_gguf(tmp_path / "blocks.gguf")  # the same numbers, but for activations of 8 bits
    assert isinstance(kept.embed_tokens, QuantizedEmbedding)
    for block in kept.blocks:
        layers = [block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down]
        assert all(isinstance(layer, QuantizedLinear) for layer in layers)
        assert [rows for _, rows in block.attention.qkv.parts] == [64, 32, 32]
    tokens = torch.arange(40)[None]
    expected = floats.logits(floats(tokens).hidden)
    error = (kept.logits(kept(tokens).hidden) - expected).norm() / expected.norm()
    assert 0 < error < 0.03  # a step of 8 bits is 1 / 127 of a block's largest; rows in a wrong order would give over 1


def test_floats_beside_blocks_are_numbers(tmp_path, monkeypatch):
    """A matrix of which one part is no blocks is joined as numbers; biases come to quantised layers too."""
    monkeypatch.setitem(CASES, "qwen2", ("Qwen2", {"hidden_size": 64, "intermediate_size": 96}))
    theirs = make_theirs("qwen2", tmp_path, monkeypatch)
    tensors = converted(theirs, "qwen2", False)
    kind = gguf.GGMLQuantizationType.Q8_0
    names = ["blk.0.attn_q.weight", *[f"blk.1.attn_{p}.weight" for p in "qkv"]]
    write(tmp_path / "a.gguf", "qwen2", theirs.config, tensors, {}, dict.fromkeys(names, kind))
    ours = load_gguf(tmp_path / "a.gguf")
    assert ours.dtype == torch.float32
    mixed, blocks = ours.blocks[0].attention.qkv, ours.blocks[1].attention.qkv
    assert isinstance(mixed, Linear)
    assert blocks.parts == [("q8_0", 64 + 2 * 32)]
    bias = np.concatenate([tensors[f"blk.1.attn_{p}.bias"] for p in "qkv"])
    assert torch.equal(blocks.bias, torch.from_numpy(bias))
    tokens = torch.arange(40)[None]
    expected = theirs(tokens).logits
    assert (ours.logits(ours(tokens).hidden) - expected).abs().max() < 0.1 * expected.std()


def test_latent_matrix_in_two(tmp_path, monkeypatch):
    """Newer DeepSeek files hold the matrix from the latent as that of the keys, transposed, and that of the values."""
    arch, permute, more = ARCHITECTURES["deepseek_v3"]
    theirs = make_theirs("deepseek_v3", tmp_path, monkeypatch)
    tensors = converted(theirs, arch, permute)
    write(tmp_path / "one.gguf", arch, theirs.config, tensors, more)
    for name in [name for name in tensors if name.endswith("attn_kv_b.weight")]:
        heads = tensors.pop(name).reshape(4, 16 + 12, 16)
        prefix = name.removesuffix("attn_kv_b.weight")
        tensors[prefix + "attn_k_b.weight"] = heads[:, :16].swapaxes(1, 2)
        tensors[prefix + "attn_v_b.weight"] = heads[:, 16:]
    more = more | {
        "attention.head_count_kv": 1, "attention.key_length": 24, "attention.value_length": 16,
        "attention.key_length_mla": 24, "attention.value_length_mla": 12,
    }  # fmt: skip
    write(tmp_path / "two.gguf", arch, theirs.config, tensors, more)
    one, two = load_gguf(tmp_path / "one.gguf"), load_gguf(tmp_path / "two.gguf")
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def _drop(tensors, more):
    del tensors["blk.1.attn_k.weight"]


def _cut(tensors, more):
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-1]


def _stray(tensors, more):
    tensors["blk.0.attn_rot_embd.weight"] = np.ones(8)


def _second_output(tensors, more):
    tensors["output.weight"] = np.zeros((99, 32))


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (_drop, {}, "tensor 'blk.1.attn_k.weight' is missing"),
        (_cut, {}, r"'blk.1.ffn_gate.weight' gives shape \(56, 32\) \+ \(55, 32\); the metadata asks for \(112, 32\)"),
        (_stray, {}, "tensor 'blk.0.attn_rot_embd.weight' has no place in this model"),
        (None, {"attention.head_count": 0}, "llama.attention.head_count is 0; accepted: 1 or more"),
        (None, {"attention.head_count": 3}, "num_kv_heads is 2; accepted: a divisor of num_heads = 3"),
        (None, {"block_count": 2**31}, "llama.block_count is 2147483648; accepted: up to 29"),
        (None, {"expert_count": 2**31}, "llama.expert_count is 2147483648; accepted: up to 16384"),
        (None, {"block_count": 4}, "tensor 'blk.3.attn_q.weight' is missing"),
        (None, {"block_count": "three"}, "llama.block_count is 'three'; accepted: a whole number"),
        (None, {"rope.scaling.type": "longrope"}, "scaling.type is 'longrope'; accepted: 'none', 'linear', 'yarn'"),
        (None, {"rope.scaling.type": "linear"}, "has no metadata 'llama.rope.scaling.factor'"),
        (None, {"attention.value_length": 4}, "llama.attention.value_length is 4; accepted: key_length = 8"),
        (None, {"context_length": 2**31}, "max_positions is 2147483648: rotary tables of 68719476736 bytes"),
        (None, {"embedding_length": 2**31}, "gives shape .* the metadata asks for"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(change, more, message, tmp_path, monkeypatch):
    theirs = make_theirs("llama, multi-query", tmp_path, monkeypatch)
    theirs.config.num_key_value_heads = 2 if more.get("attention.head_count") else 1
    tensors = converted(theirs, "llama", False)
    if change is not None:
        change(tensors, more)
    write(tmp_path / "model.gguf", "llama", theirs.config, tensors, more)
    with pytest.raises(CheckpointError, match=message) as error:
        load_gguf(tmp_path / "model.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")


def test_refuses_an_unknown_architecture(tmp_path, monkeypatch):
    theirs = make_theirs("llama, tied", tmp_path, monkeypatch)
    write(tmp_path / "model.gguf", "rwkv7", theirs.config, converted(theirs, "llama", True), {})
    with pytest.raises(CheckpointError, match=r"general.architecture is 'rwkv7'; accepted: llama, "):
        load_gguf(tmp_path / "model.gguf")


def test_an_output_matrix_beside_a_tied_table(tmp_path, monkeypatch):
    """GPT-2's table may stand in the file twice; another matrix there is an error."""
    theirs = make_theirs("gpt2", tmp_path, monkeypatch)
    tensors = converted(theirs, "gpt2", False)
    more = ARCHITECTURES["gpt2"][2]
    write(
        tmp_path / "same.gguf", "gpt2", theirs.config, tensors | {"output.weight": tensors["token_embd.weight"]}, more
    )
    load_gguf(tmp_path / "same.gguf")
    _second_output(tensors, more)
    write(tmp_path / "other.gguf", "gpt2", theirs.config, tensors, more)
    with pytest.raises(CheckpointError, match=r"'output.weight' has no place"):
        load_gguf(tmp_path / "other.gguf")


def test_refuses_to_write_what_the_metadata_cannot_say(tmp_path):
    model, tokenizer = tiny(attention_scale=0.3)
    with pytest.raises(ValueError, match=r"no family of transformers describes|can't say all of"):
        save_gguf(model, tokenizer, tmp_path / "a.gguf")
    model, _ = tiny()
    with pytest.raises(ValueError, match="format is 'q2_k'; accepted: 'f16', 'bf16', 'q8_0', 'q4_0'"):
        save_gguf(model, tokenizer, tmp_path / "a.gguf", format="q2_k")
    with pytest.raises(ValueError, match="a WordLevel tokenizer has no form in GGUF files"):
        save_gguf(model, train_tokenizer(["a b"], kind="word", vocab_size=20), tmp_path / "a.gguf")
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"'blk.0.ffn_down.weight' holds numbers too large for f16; accepted: bf16"):
        save_gguf(model, tokenizer, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
