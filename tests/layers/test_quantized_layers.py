"""Quantised layers and models: what they compute, what they keep in memory, what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import reference
from llmcore.inference import generate
from llmcore.layers import Linear, MoE, QuantizedEmbedding, QuantizedExperts, QuantizedLinear, quantize_model
from llmcore.models import ModelConfig, MoEConfig, Transformer
from llmcore.models.pretrained import save_pretrained
from llmcore.reference.quantized import FORMATS


def rounded_linear(x, weight, bias=None):
    q, scale = reference.quantize_activations(x)
    return F.linear((q * scale.unsqueeze(-1)).flatten(-2), weight, bias)


def test_parts_are_one_matrix():
    weight, bias = torch.randn(70, 256), torch.randn(70)
    formats = [("q4_k", 0, 33), ("q4_k", 33, 50), ("q6_k", 50, 70)]
    parts = [(f, reference.quantize(weight[begin:end], f)) for f, begin, end in formats]
    layer = QuantizedLinear(parts, bias)
    assert layer.parts == [("q4_k", 50), ("q6_k", 20)]
    assert (layer.in_features, layer.out_features, layer.num_weights) == (256, 70, 70 * 256)
    x = torch.randn(2, 3, 256)
    exact = torch.cat([reference.dequantize(blocks, f) for f, blocks in parts])
    torch.testing.assert_close(layer(x), rounded_linear(x, exact, bias), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"the parts' rows have \[256, 512\] weights"):
        QuantizedLinear([parts[0], ("q8_0", reference.quantize(torch.randn(2, 512), "q8_0"))])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); accepted: \(70,\)"):
        QuantizedLinear(parts, torch.zeros(3))


def test_embedding_follows_the_dtype():
    weight = torch.randn(40, 64)
    blocks = reference.quantize(weight, "q5_1")
    table = QuantizedEmbedding("q5_1", blocks)
    ids = torch.tensor([[0, 39], [7, 7]])
    exact = reference.dequantize(blocks, "q5_1")
    assert torch.equal(table(ids), exact[ids])
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(table.project(hidden), rounded_linear(hidden, exact), rtol=1e-5, atol=1e-4)
    table.to(torch.bfloat16)
    assert torch.equal(table(ids), exact[ids].bfloat16())
    assert table.packed.dtype == torch.uint8


def small_model(tied: bool, dim: int = 64) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=120, dim=dim, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, max_positions=64,
            tied_embeddings=tied, qkv_bias=True,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_k"])
def test_quantized_model(format, tied):
    model = small_model(tied)
    tokens = torch.randint(0, 120, (2, 20))
    with torch.no_grad():
        exact = model.logits(model(tokens).hidden)
    parameters, active = model.num_parameters(), model.num_parameters(active=True)
    bytes_before = sum(t.nbytes for t in model.state_dict().values())
    assert not model.is_quantized
    assert model.cache_dtype == torch.float32
    assert quantize_model(model, format) is model
    assert model.is_quantized
    assert (model.num_parameters(), model.num_parameters(active=True)) == (parameters, active)
    assert not [m for m in model.modules() if isinstance(m, (Linear, torch.nn.Embedding))]
    wanted = {"q8_0": "q8_0", "q4_0": "q4_0", "q4_k": "q5_0"}[format]  # 64 is no multiple of 256
    assert model.blocks[0].attention.qkv.parts == [(wanted, 128)]
    assert model.embed_tokens.format == "q8_0"
    assert sum(t.nbytes for t in model.state_dict().values()) < (0.4 if format == "q8_0" else 0.35) * bytes_before
    with torch.no_grad():
        logits = model.logits(model(tokens).hidden)
    limit = {"q8_0": 0.03, "q5_0": 0.12, "q4_0": 0.25}[wanted]
    assert (logits - exact).norm() < limit * exact.norm()
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.cache_dtype == torch.float16
    assert model.to(torch.bfloat16).cache_dtype == torch.bfloat16
    with pytest.raises(TypeError, match="the output matrix is quantised"):
        _ = model.lm_head_weight


def experts_of(layer: QuantizedExperts) -> torch.Tensor:
    """Its numbers, (num_experts, out_features, in_features)."""
    parts = []
    for i, (format, rows) in enumerate(layer.parts):
        blocks = [reference.unpack_quantized(p, format, rows, layer.in_features) for p in getattr(layer, f"packed{i}")]
        parts.append(torch.stack([reference.dequantize(b, format) for b in blocks]))
    return torch.cat(parts, dim=1)


def test_parts_of_experts_are_one_matrix_each():
    weight, bias = torch.randn(3, 70, 256), torch.randn(3, 70)
    formats = [("q4_k", 0, 33), ("q4_k", 33, 50), ("q6_k", 50, 70)]
    parts = [
        (f, reference.quantize(weight[:, begin:end].flatten(0, 1), f).unflatten(0, (3, end - begin)))
        for f, begin, end in formats
    ]
    layer = QuantizedExperts(parts)
    assert layer.parts == [("q4_k", 50), ("q6_k", 20)]
    assert (layer.num_experts, layer.in_features, layer.out_features) == (3, 256, 70)
    assert layer.num_weights == weight.numel()
    exact = torch.cat([reference.dequantize(b.flatten(0, 1), f).unflatten(0, (3, -1)) for f, b in parts], dim=1)
    assert torch.equal(experts_of(layer), exact)
    x, offsets = torch.randn(4, 256), torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    token_of = torch.tensor([3, 0, 1, 2, 3, 0], dtype=torch.int32)
    expected = torch.stack([rounded_linear(x[t], exact[e], bias[e]) for t, e in zip(token_of, [0, 2, 2, 2, 2, 2])])
    torch.testing.assert_close(layer(x, offsets, token_of=token_of, bias=bias), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"the parts have \[\(3, 256\), \(3, 512\)\] experts and weights in a row"):
        QuantizedExperts([parts[0], ("q8_0", torch.zeros(3, 2, 16 * 34, dtype=torch.uint8))])


@pytest.mark.parametrize("options", [{}, {"bias": True, "activation": "swiglu_oss"}, {"activation": "geglu"}], ids=str)
@pytest.mark.parametrize("wide", ["gate_up", "down", "both"])
def test_quantised_experts_compute_what_their_numbers_do(options, wide):
    """`wide` is what rows are long enough for: the others stay floats."""
    torch.manual_seed(0)
    dim, ffn_dim = {"gate_up": (64, 40), "down": (40, 64), "both": (64, 96)}[wide]
    layer, floats = (MoE(dim, ffn_dim, 5, 2, shared_experts=0, **options).eval() for _ in range(2))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.randn_like(p) * (0.5 if "bias" in name or name == "router.weight" else p.shape[-1] ** -0.5))
    floats.load_state_dict(layer.state_dict())
    quantize_model(layer, "q8_0")
    with torch.no_grad():
        for name in ("gate_up", "down"):
            assert isinstance(getattr(layer, name), QuantizedExperts) == (wide in (name, "both"))
            if wide in (name, "both"):
                getattr(floats, name).copy_(experts_of(getattr(layer, name)))
        for tokens in (1, 3, 50):
            x = torch.randn(tokens, dim)
            exact, ours = floats(x), layer(x)
            assert torch.equal(ours.expert_load, exact.expert_load)
            assert 0 < (ours.hidden - exact.hidden).norm() < 0.02 * exact.hidden.norm()


def test_weights_of_multi_token_prediction_are_counted_as_before():
    config = ModelConfig(
        vocab_size=120, dim=64, num_layers=2, num_heads=4, ffn_dim=96, max_positions=64, mtp_layers=1,
        moe=MoEConfig(6, 2, 96, balancing="none"),
    )  # fmt: skip
    model = Transformer(config)
    counts = model.num_parameters(), model.num_parameters(active=True)
    quantize_model(model, "q8_0")
    assert isinstance(model.mtp[0].block.mlp.down, QuantizedExperts)
    assert (model.num_parameters(), model.num_parameters(active=True)) == counts


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_k"])
def test_quantized_experts_in_a_model(format):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=120, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, max_positions=64,
        moe=MoEConfig(6, 2, 96, shared_experts=1, first_dense_layers=1, balancing="none"),
    )  # fmt: skip
    model = Transformer(config).eval()
    counts = model.num_parameters(), model.num_parameters(active=True)
    bytes_before = sum(t.nbytes for t in model.state_dict().values())
    quantize_model(model, format)
    layer = model.blocks[1].mlp
    wanted = {"q8_0": "q8_0", "q4_0": "q4_0", "q4_k": "q5_0"}[format]
    assert layer.gate_up.parts == [(wanted, 192)]
    assert layer.down.parts == [(wanted, 64)]
    assert isinstance(layer.shared.down, QuantizedLinear)
    assert isinstance(layer.router, torch.nn.Linear)
    assert (model.num_parameters(), model.num_parameters(active=True)) == counts
    assert sum(t.nbytes for t in model.state_dict().values()) < (0.35 if format == "q8_0" else 0.25) * bytes_before
    tokens = torch.randint(0, 120, (1, 20))
    with torch.no_grad(), torch.random.fork_rng():
        logits = model.logits(model(tokens).hidden)
        assert model(tokens.clone()).expert_load.sum() == 2 * 20
    (new,) = generate(model, [[5, 6, 7]], max_tokens=12, temperature=0.0)
    with torch.no_grad():
        full = model.logits(model(torch.tensor([[5, 6, 7, *new[:-1]]])).hidden)
    assert full[0, 2:].argmax(-1).tolist() == new
    again = quantize_model(Transformer(config).eval(), format)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.logits(again(tokens).hidden), logits)


def test_rows_of_256_take_nested_formats():
    model = quantize_model(small_model(True, dim=256), "q4_k")
    assert model.blocks[1].mlp.gate_up.parts == [("q4_k", 192)]
    assert model.blocks[1].mlp.down.parts == [("q5_0", 256)]  # 96 is no multiple of 256
    assert model.embed_tokens.format == "q6_k"


def test_rows_that_fit_no_block_stay():
    layer = torch.nn.Sequential(Linear(40, 8), Linear(64, 8))
    quantize_model(layer, "q4_k")
    assert isinstance(layer[0], Linear)
    assert isinstance(layer[1], QuantizedLinear)
    with pytest.raises(ValueError, match="quantised format 'q3_k'; accepted: q4_0, q4_1"):
        quantize_model(layer, "q3_k")


def test_decoding_equals_the_full_pass():
    model = quantize_model(small_model(True), "q8_0")
    (tokens,) = generate(model, [[5, 6, 7]], max_tokens=12, temperature=0.0)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[5, 6, 7, *tokens[:-1]]])).hidden)
    assert logits[0, 2:].argmax(-1).tolist() == tokens


def test_a_saved_state_loads():
    model = quantize_model(small_model(False), "q4_0")
    other = quantize_model(small_model(False), "q4_0")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    other.embed_tokens.packed.zero_()
    other.load_state_dict(state)
    tokens = torch.randint(0, 120, (1, 9))
    assert torch.equal(model(tokens).hidden, other(tokens).hidden)


def test_is_not_saved_as_floats(tmp_path):
    with pytest.raises(ValueError, match="the model is quantised; save_pretrained writes floating-point weights"):
        save_pretrained(quantize_model(small_model(True), "q8_0"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_no_gradient(name):
    blocks = reference.quantize(torch.randn(8, 256), name)
    x = torch.randn(2, 256, requires_grad=True)
    with pytest.raises(RuntimeError, match="quantized_linear has no gradient"):
        QuantizedLinear([(name, blocks)])(x).sum().backward()
