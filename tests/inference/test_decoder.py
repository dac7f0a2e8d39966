"""The decoder in C++ gives the bits of the model, op by op."""

import dataclasses

import pytest
import torch

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.decoder import Decoder, can_decode
from llmcore.layers import QuantizedLinear, quantize_model
from llmcore.models import ModelConfig, Transformer
from llmcore.ops.quantized_linear import quantize

PLAIN = ModelConfig(vocab_size=61, dim=48, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=80, max_positions=64)
KINDS = {
    "llama": {},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 16, "tied_embeddings": False},
    "gemma": {
        "norm_placement": "sandwich", "norm_unit_offset": True, "activation": "geglu", "embedding_scale": "sqrt_dim",
        "window": 5, "window_layers": (0, 2), "local_rope_base": 100.0, "attention_softcap": 3.0,
    },
    "sinks": {"attention_sinks": True, "window": 4, "attention_scale": 0.2},
    "some rotate": {"no_rope_layers": (1,), "rope_fraction": 0.5, "rope_interleaved": True},
    "no positions": {"position": "none"},
}  # fmt: skip


def make(kind: str, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(PLAIN, **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases, too, that tell where they went
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_same_bits_as_the_model(kind, dtype):
    model = make(kind, dtype)
    caches = [PagedKVCache(model.config, 12, block_size=4, dtype=dtype) for _ in range(2)]
    decoder = Decoder(model, caches[1])
    # a prompt, prompts of several lengths in one pass, then a token each
    for sequences, counts in (([3], [7]), ([3, 5, 4], [1, 6, 2]), ([4, 3], [1, 1]), ([5], [1]), ([3, 4, 5], [1, 1, 1])):
        tokens = torch.randint(61, (sum(counts),))
        steps = [cache.extend(sequences, counts) for cache in caches]
        assert torch.equal(decoder.hidden(tokens, steps[1]), model(tokens, cache=steps[0]).hidden)
    for mine, theirs in zip(caches[1].k_caches + caches[1].v_caches, caches[0].k_caches + caches[0].v_caches):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_quantised_weights(dtype):
    """All in one format, parts of a matrix in several, and one left as it is."""
    config = dataclasses.replace(PLAIN, dim=64, num_heads=4, ffn_dim=96, qkv_bias=True)
    torch.manual_seed(0)
    model = Transformer(config)
    for block in model.blocks:
        block.attention.qkv.bias.normal_()
    model.blocks[1].attention.qkv = _mixed(model.blocks[1].attention.qkv)
    kept = model.blocks[2].mlp.down
    quantize_model(model, "q4_0")
    model.blocks[2].mlp.down = kept
    model = model.to(dtype).eval()
    caches = [PagedKVCache(config, 8, dtype=dtype) for _ in range(2)]
    decoder = Decoder(model, caches[1])
    for sequences, counts in (([0, 1], [9, 4]), ([1, 0], [1, 1])):
        tokens = torch.randint(61, (sum(counts),))
        steps = [cache.extend(sequences, counts) for cache in caches]
        assert torch.equal(decoder.hidden(tokens, steps[1]), model(tokens, cache=steps[0]).hidden)


def _mixed(linear: torch.nn.Linear) -> QuantizedLinear:
    parts = [("q5_1", linear.weight[:40]), ("q8_0", linear.weight[40:])]
    return QuantizedLinear([(f, quantize(rows, f)) for f, rows in parts], linear.bias)


@torch.inference_mode()
def test_a_cache_of_another_dtype():
    model = make("llama", torch.float32)
    caches = [PagedKVCache(model.config, 4, dtype=torch.float16) for _ in range(2)]
    decoder = Decoder(model, caches[1])
    for count in (9, 1):
        tokens = torch.randint(61, (count,))
        steps = [cache.extend([0], [count]) for cache in caches]
        assert torch.equal(decoder.hidden(tokens, steps[1]), model(tokens, cache=steps[0]).hidden)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("positions", torch.tensor([0, 64]), "position 64 of token 1; accepted: 0 to 63"),
        ("slot_mapping", torch.tensor([0, 16]), "slot 16 of token 1; accepted: -1 to 15"),
        ("block_table", torch.tensor([[4]], dtype=torch.int32), "block 4 of sequence 0; accepted: 0 to 3"),
        ("kv_lens", torch.tensor([5], dtype=torch.int32), "sequence 0 has 5 keys; accepted: 0 to 4"),
        ("cu_seqlens_q", torch.tensor([0, 3], dtype=torch.int32), "cu_seqlens_q does not rise from 0 to 2"),
        ("cu_seqlens_q", None, "2 tokens of 1 sequences"),
    ],
)
@torch.inference_mode()
def test_what_is_out_of_range(field, value, text):
    model = make("llama", torch.float32)
    cache = PagedKVCache(model.config, 4, block_size=4)
    step = dataclasses.replace(cache.extend([0], [2]), **{field: value})
    with pytest.raises(RuntimeError, match=text):
        Decoder(model, cache).hidden(torch.tensor([1, 2]), step)
    assert not any(c.any() for c in cache.k_caches), "nothing is written"


def test_too_many_tokens():
    model = make("llama", torch.float32)
    cache = PagedKVCache(model.config, 4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="33 tokens; accepted: 1 to 32"):
        Decoder(model, cache).hidden(torch.ones(33, dtype=torch.int64), cache.extend([0], [33]))


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "layer"},
        {"norm_placement": "post"},
        {"activation": "gelu"},
        {"position": "learned"},
        {"qk_norm": True, "qk_norm_scope": "all"},
        {"moe": {"num_experts": 4, "top_k": 2, "ffn_dim": 16}},
    ],
)
def test_models_it_does_not_serve(change):
    model = Transformer(dataclasses.replace(PLAIN, **change))
    assert not can_decode(model)
    with pytest.raises(ValueError, match="no decoder for this model"):
        Decoder(model, PagedKVCache(model.config, 1))
