"""The attention layer against torch's own attention, and its three kinds of input against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore.inference import PagedKVCache
from llmcore.layers import Attention, RotaryEmbedding
from llmcore.models import ModelConfig

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


@pytest.fixture(params=HEADS, ids=str)
def heads(request):
    return HEADS[request.param]


def by_hand(layer: Attention, x, window=None):
    """The same layer out of torch's own operators, key and value heads repeated for their query heads."""
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split((heads * dim, kv_heads * dim, kv_heads * dim), -1)
    q, k, v = (t.view(*x.shape[:2], -1, dim).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    i = torch.arange(x.shape[1])
    mask = i[:, None] >= i
    if window is not None:
        mask &= i[:, None] - i < window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(out.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(heads, bias, window):
    torch.manual_seed(0)
    layer = Attention(48, *heads, 16, qkv_bias=bias, out_bias=bias, window=window)
    x = torch.randn(2, 19, 48, requires_grad=True)
    seed = torch.randn(2, 19, 48)
    leaves = [x, *layer.parameters()]
    outputs, gradients = [], []
    for out in (layer(x), by_hand(layer, x, window)):
        outputs.append(out)
        gradients.append(torch.autograd.grad(out, leaves, seed))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_weight_shapes(heads):
    num_heads, kv_heads = heads
    layer = Attention(48, num_heads, kv_heads, 16)
    assert layer.qkv.weight.shape == ((num_heads + 2 * kv_heads) * 16, 48)
    assert layer.qkv.bias is None
    assert layer.out.bias is None


def test_packed_equals_each_document_alone(heads):
    torch.manual_seed(1)
    layer = Attention(32, *heads, 8, qk_norm=True, sinks=True)
    torch.nn.init.normal_(layer.sinks)
    rope = RotaryEmbedding(8, 64)
    lengths = [1, 17, 0, 6, 30]
    documents = [torch.randn(n, 32) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = layer(torch.cat(documents), rope=rope, positions=positions, cu_seqlens=cu_seqlens)
    alone = [layer(d[None], rope=rope)[0] for d in documents if len(d)]
    torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 5.0}, {"sinks": True}, {"scale": 0.5}], ids=str)
def test_paged_cache_equals_full_pass(heads, options):
    """Prefill in two chunks, then one token at a time, over blocks of 4 handed out in a shuffled order."""
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=8, dim=32, num_layers=1, num_heads=4, num_kv_heads=heads[1], head_dim=8)
    layer = Attention(32, *heads, 8, **options).requires_grad_(False)
    if layer.sinks is not None:
        layer.sinks.normal_()
    rope = RotaryEmbedding(8, 64)
    x = torch.randn(2, 21, 32)
    full = layer(x, rope=rope)
    cache = PagedKVCache(config, 16, block_size=4)
    cache.extend(range(16), [4] * 16)
    for block in torch.randperm(16).tolist():  # the last one released is the first one handed out
        cache.release(block)
    for tensor in cache.k_caches + cache.v_caches:
        tensor.fill_(float("nan"))  # what no token wrote must not be read
    begin = [0, 0]
    for chunk in [(9, 3), (5, 8), *[(1, 1)] * 7]:
        step = cache.extend([7, 5], chunk)
        rows = torch.cat([x[i, begin[i] : begin[i] + n] for i, n in enumerate(chunk)])
        out = layer(rows, rope=rope, positions=step.positions, cache=step)
        expected = torch.cat([full[i, begin[i] : begin[i] + n] for i, n in enumerate(chunk)])
        torch.testing.assert_close(out, expected)
        begin = [b + n for b, n in zip(begin, chunk)]


def test_not_causal_sees_the_future():
    torch.manual_seed(3)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[0, -1] += 1
    for causal in (True, False):
        layer = Attention(16, 2, 2, 8, causal=causal)
        same = torch.equal(layer(x)[0, 0], layer(changed)[0, 0])
        assert same == causal


def test_sinks_take_weight_away():
    torch.manual_seed(4)
    layer = Attention(16, 2, 2, 8, sinks=True)
    layer.sinks.data.fill_(50.0)
    assert layer(torch.randn(1, 6, 16)).abs().max() < 1e-6


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_kv_heads is 3; accepted: a divisor of num_heads = 4"):
        Attention(32, 4, 3, 8)
    with pytest.raises(ValueError, match="num_heads is 0; accepted: 1 or more"):
        Attention(32, 0, 1, 8)


def test_refuses_packed_tokens_without_positions():
    layer, cu_seqlens = Attention(32, 4, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="positions is None; accepted with rope and packed tokens"):
        layer(torch.randn(5, 32), rope=RotaryEmbedding(8, 64), cu_seqlens=cu_seqlens)
