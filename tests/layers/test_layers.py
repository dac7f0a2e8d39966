"""Norms, rotary embedding, feed-forward layers and low-rank attention against their formulas in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore.layers import MLP, DyT, GatedMLP, LinformerAttention, RotaryEmbedding, make_mlp, make_norm


def formula(kind, norm, x):
    if kind == "rms":
        return F.rms_norm(x, (24,), norm.weight, norm.eps)
    if kind == "layer":
        return F.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps)
    return torch.tanh(norm.alpha * x) * norm.weight + norm.bias


@pytest.mark.parametrize(("kind", "bias"), [("rms", True), ("layer", True), ("layer", False), ("dyt", True)])
def test_norm(kind, bias):
    torch.manual_seed(0)
    norm = make_norm(kind, 24, 1e-3, bias)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, residual = torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    torch.testing.assert_close(norm(x), formula(kind, norm, x))
    y, z = norm(x, residual)
    torch.testing.assert_close(z, x + residual)
    torch.testing.assert_close(y, formula(kind, norm, x + residual))
    (y.sum() + z.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in norm.parameters())


def test_norm_kinds():
    assert make_norm("layer", 4, bias=False).bias is None
    assert isinstance(make_norm("dyt", 4), DyT)
    with pytest.raises(ValueError, match="'batch'; accepted: 'rms', 'layer', 'dyt'"):
        make_norm("batch", 4)


def rotate(x, positions, rotary_dim, base, interleaved):
    """RoPE as multiplication of complex numbers, in float64."""
    x = x.double()
    angle = positions.double()[..., None] * base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turn = torch.polar(torch.ones_like(angle), angle)[..., None, :]
    head, tail = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else torch.stack(head.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    head = turned.flatten(-2) if interleaved else torch.cat((turned[..., 0], turned[..., 1]), -1)
    return torch.cat((head, tail), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rope(rotary_dim, interleaved):
    torch.manual_seed(0)
    rope = RotaryEmbedding(rotary_dim, 100, 500.0, interleaved)
    x = torch.randn(2, 7, 3, 16)
    expected = rotate(x, torch.arange(7).expand(2, 7), rotary_dim, 500.0, interleaved)
    torch.testing.assert_close(rope(x).double(), expected, rtol=0, atol=1e-5)
    positions = torch.randint(0, 100, (2, 7))
    expected = rotate(x, positions, rotary_dim, 500.0, interleaved)
    torch.testing.assert_close(rope(x, positions).double(), expected, rtol=0, atol=1e-5)
    packed = rope(x.flatten(0, 1), positions.flatten())
    torch.testing.assert_close(packed, rope(x, positions).flatten(0, 1), rtol=0, atol=0)


def test_rope_tables_survive_casts():
    rope = RotaryEmbedding(8, 32)
    cos = rope.cos.clone()
    assert rope.to(torch.bfloat16).cos.dtype == torch.float32
    assert torch.equal(rope.cos, cos)
    assert torch.equal(rope.to("meta").to_empty(device="cpu").cos, cos)
    assert not rope.state_dict()


def test_rope_refuses():
    with pytest.raises(ValueError, match="rotary_dim is 7"):
        RotaryEmbedding(7, 32)
    with pytest.raises(ValueError, match=r"33 positions; accepted: at most max_positions = 32"):
        RotaryEmbedding(8, 32)(torch.randn(1, 33, 1, 8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_erf", "relu"])
def test_mlp(activation, bias):
    torch.manual_seed(0)
    layer = make_mlp(activation, 12, 20, bias)
    x = torch.randn(2, 5, 12)
    plain = {"gelu": lambda t: F.gelu(t, approximate="tanh"), "gelu_erf": F.gelu, "relu": F.relu}
    if activation in plain:
        assert isinstance(layer, MLP)
        inner = plain[activation](layer.up(x))
    else:
        assert isinstance(layer, GatedMLP)
        gate, up = layer.gate_up(x)[..., :20], layer.gate_up(x)[..., 20:]
        inner = (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    torch.testing.assert_close(layer(x), layer.down(inner))
    assert (layer.down.bias is not None) == bias


def test_mlp_refuses():
    with pytest.raises(ValueError, match=r"'tanh'; accepted: 'swiglu', .*'gelu_erf', 'relu'"):
        make_mlp("tanh", 4, 8)


def linformer_by_hand(layer, x):
    heads, seq = layer.num_heads, x.shape[1]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    k = torch.einsum("pn,bhnd->bhpd", layer.key_proj[:, :seq], k)
    v = torch.einsum("pn,bhnd->bhpd", layer.value_proj[:, :seq], v)
    return layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seq", [1, 13, 32])
def test_linformer(seq):
    torch.manual_seed(0)
    layer = LinformerAttention(24, 3, 32, 5)
    x = torch.randn(2, seq, 24, requires_grad=True)
    seed = torch.randn(2, seq, 24)
    leaves = [x, *layer.parameters()]
    outputs, gradients = [], []
    for out in (layer(x), linformer_by_hand(layer, x)):
        outputs.append(out)
        gradients.append(torch.autograd.grad(out, leaves, seed))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_linformer_with_identity_projection_is_full_attention():
    torch.manual_seed(1)
    layer = LinformerAttention(24, 3, 16, 16)
    layer.key_proj.data, layer.value_proj.data = torch.eye(16), torch.eye(16)
    x = torch.randn(2, 16, 24)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    expected = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_linformer_refuses():
    with pytest.raises(ValueError, match="num_heads is 5; accepted: a divisor of dim = 24"):
        LinformerAttention(24, 5, 32, 5)
    with pytest.raises(ValueError, match="k_proj is 33; accepted: 1 to max_positions = 32"):
        LinformerAttention(24, 3, 32, 33)
    with pytest.raises(ValueError, match="seq is 33; accepted: at most max_positions = 32"):
        LinformerAttention(24, 3, 32, 5)(torch.randn(1, 33, 24))
