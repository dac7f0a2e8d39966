"""What attention and paged attention say to bad input: the value and what would be accepted, before anything runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import llmcore
from llmcore import ops
from llmcore.ops import BlockMask


def qkv(batch=2, seq=6, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    return (
        torch.randn(batch, seq, heads, dim, dtype=dtype),
        torch.randn(batch, seq, kv_heads, dim, dtype=dtype),
        torch.randn(batch, seq, kv_heads, dim, dtype=dtype),
    )


CALL = qkv()


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: dict(q=q[0], k=k, v=v), r"q has shape \(6, 4, 8\); expected \(batch, seq, heads, head_dim\)"),
        (lambda q, k, v: dict(q=q[:, :, :3], k=k, v=v), "q has 3 heads and k has 2; the heads of q must be a multiple"),
        (lambda q, k, v: dict(q=q, k=k[..., :7], v=v), "k has head size 7, but q has 8"),
        (lambda q, k, v: dict(q=q, k=k, v=v[:, :5]), "k has 6 keys, but v has 5"),
        (lambda q, k, v: dict(q=q, k=k, v=v[:, :, :1]), "v has 1 heads, but k has 2"),
        (lambda q, k, v: dict(q=q, k=k.bfloat16(), v=v), "k has dtype bfloat16, but q has float32"),
        (lambda q, k, v: dict(q=q, k=k[:1], v=v), "batch sizes 2, 1, 2; they must be equal"),
        (lambda q, k, v: dict(q=q, k=k, v=v, scale=float("nan")), "scale is nan; it must be finite"),
        (lambda q, k, v: dict(q=q, k=k, v=v, scale=1e300), r"scale is 1e\+300; it must be finite in float32"),
        (lambda q, k, v: dict(q=q, k=k, v=v, softcap=float("inf")), "softcap is inf"),
        (lambda q, k, v: dict(q=q, k=k, v=v, softcap=float("nan")), "softcap is nan"),
        (lambda q, k, v: dict(q=q, k=k, v=v, softcap=3e38), r"softcap is 3e\+38; accepted: 1e-30 to 1e30"),
        (lambda q, k, v: dict(q=q, k=k, v=v, softcap=1e-50), "softcap is 1e-50; accepted: 1e-30 to 1e30"),
        (lambda q, k, v: dict(q=torch.tensor(1.0), k=k, v=v), r"q has shape \(\); expected \(batch, seq, heads"),
        (lambda q, k, v: dict(q=q[..., :0], k=k[..., :0], v=v), r"head sizes are 0 \(q, k\) and 8 \(v\)"),
        (lambda q, k, v: dict(q=q, k=k, v=v[..., :0]), r"head sizes are 8 \(q, k\) and 0 \(v\)"),
        (lambda q, k, v: dict(q=q, k=k, v=v, sinks=torch.zeros(3)), r"sinks has shape \(3,\); expected \(4\)"),
        (lambda q, k, v: dict(q=q, k=k, v=v, cu_seqlens_k=cu(0, 6)), "cu_seqlens_k is given without cu_seqlens_q"),
        (lambda q, k, v: dict(q=q, k=k, v=v, block_mask=BlockMask.local(64, 64, 0, block_q=5, block_k=2)), None),
        (
            lambda q, k, v: dict(q=q, k=k, v=v, block_mask=BlockMask(torch.ones(1, 1, 1, 2, dtype=torch.bool), 6, 2)),
            "block_mask has shape .* it must cover batch 2 .* 6 queries and 6 keys",
        ),
        (lambda q, k, v: dict(q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu(0, 4)), "cu_seqlens_q ends with 4, but q has 6"),
        (lambda q, k, v: dict(q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu(1, 6)), r"cu_seqlens_q\[0\] is 1"),
        (lambda q, k, v: dict(q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu(0, 7, 6)), r"cu_seqlens_q\[2\] is 6, below 7"),
        (
            lambda q, k, v: dict(q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu(0, 6).long()),
            "cu_seqlens_q has dtype int64; expected int32",
        ),
        (
            lambda q, k, v: dict(q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu(0, 6), cu_seqlens_k=cu(0, 2, 6)),
            "cu_seqlens_k describes 2 sequences, but cu_seqlens_q 1",
        ),
    ],
)  # fmt: skip
def test_attention(change, message):
    call = change(*qkv())
    if message is None:  # a mask larger than the call is fine
        assert ops.attention(**call).isfinite().all()
        return
    with pytest.raises(RuntimeError, match=f"attention: .*{message}"):
        ops.attention(**call)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (5,)], ids=str)
def test_position_bias(backend, shape):
    message = rf"attention: position_bias has shape \({shape[0]}.*; expected \(4 heads, an odd number"
    with llmcore.backend(backend), pytest.raises(RuntimeError, match=message):
        ops.attention(*qkv(), position_bias=torch.zeros(shape))


def test_position_bias_beside_a_softcap_takes_the_reference():
    q, k, v = qkv()
    options = {"position_bias": torch.randn(q.shape[-2], 7), "softcap": 2.0}
    with pytest.warns(ops.BackendFallbackWarning, match="none beside a softcap"):
        found = ops.attention(q, k, v, **options)
    with llmcore.backend("reference"):
        assert torch.equal(found, ops.attention(q, k, v, **options))


@pytest.mark.parametrize("causal", [False, True])
def test_position_bias_is_a_mask_of_torch(causal):
    """The scores' bias written out, for torch's own attention, with the gradient of every column."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=make, requires_grad=True) for n in (40, 90, 90))
    table = torch.randn(3, 2 * 11 + 1, generator=make, requires_grad=True)
    offset = torch.arange(90) - (torch.arange(40) + 50)[:, None]
    mask = table[:, offset.clamp(-11, 11) + 11]
    if causal:
        mask = mask.masked_fill(offset > 0, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    found = ops.attention(q, k, v, causal=causal, position_bias=table)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    seed = torch.randn(found.shape, generator=make)
    for pair in zip(*(torch.autograd.grad(out, (q, k, v, table), seed) for out in (found, expected.transpose(1, 2)))):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_dtype_that_no_backend_serves():
    with pytest.raises(TypeError, match="attention: the input has dtype int32; accepted: float32, bfloat16"):
        ops.attention(*(t.int() for t in qkv()))
    with pytest.raises(RuntimeError, match="attention: q has dtype float64; accepted: float32, bfloat16, float16"):
        torch.ops.llmcore.attention(*(t.double() for t in qkv()), *[None] * 5, False, 0, 1.0, 0.0, 0, 0, False)


@pytest.mark.parametrize("option", [{"window": 0}, {"window": -3}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_options_without_meaning(option):
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        ops.attention(*qkv(), **option)


@pytest.mark.parametrize("causal", [False, True])
def test_the_widest_window_is_no_window(causal):
    widest = 2**63 - 1
    wide = ops.attention(*CALL, causal=causal, window=widest)
    assert torch.equal(wide, ops.attention(*CALL, causal=causal))


def test_one_block_of_any_size_covers_the_call():
    everything = BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 2**62, 2**63 - 1)
    assert torch.equal(ops.attention(*CALL, block_mask=everything), ops.attention(*CALL))


def test_a_row_without_keys_has_no_gradient():
    q, k, v = (t.requires_grad_() for t in qkv())
    _, lse = ops.attention(q, k[:, :4], v[:, :4], causal=True, return_lse=True)
    assert lse[..., :2].isneginf().all()
    dlse = torch.randn_like(lse)
    expected = torch.autograd.grad(lse, (q, k), dlse, retain_graph=True)
    dlse[..., :2] = float("nan")
    for actual, e in zip(torch.autograd.grad(lse, (q, k), dlse), expected):
        assert torch.equal(actual, e)


def both_caches(dtype):
    return {name: torch.zeros(5, 4, 2, 8, dtype=dtype) for name in ("k_cache", "v_cache")}


def paged(**change):
    call = {
        "q": torch.randn(2, 4, 8),
        "k_cache": torch.randn(5, 4, 2, 8),
        "v_cache": torch.randn(5, 4, 2, 8),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "kv_lens": torch.tensor([8, 5], dtype=torch.int32),
    }
    call.update(change)
    return ops.paged_attention(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[0, 9], [2, 3]]).int()}, r"block_table\[0\]\[1\] is 9, outside the cache of 5"),
        (
            {"block_table": torch.tensor([[0, 1], [-1, 3]]).int()},
            r"block_table\[1\]\[0\] is -1, outside the cache of 5",
        ),
        ({"block_table": torch.tensor([[0, 1], [2, 3]])}, "block_table has dtype int64; expected int32"),
        ({"kv_lens": torch.tensor([9, 5]).int()}, r"kv_lens\[0\] is 9; it must be between 0 and the 8 tokens"),
        ({"kv_lens": torch.tensor([-1, 5]).int()}, r"kv_lens\[0\] is -1"),
        ({"kv_lens": torch.tensor([8]).int()}, r"kv_lens has shape \(1,\); expected \(2\)"),
        ({"q": torch.randn(3, 4, 8)}, r"q has shape \(3, 4, 8\), but block_table has 2 sequences"),
        ({"q": torch.randn(2, 3, 8)}, "q has 3 heads and k has 2"),
        ({"v_cache": torch.randn(5, 3, 2, 8)}, "blocks must agree"),
        ({"v_cache": torch.randn(5, 4, 2, 8).half()}, "v_cache has dtype float16, but k_cache has float32"),
        ({"cu_seqlens_q": cu(0, 1, 5)}, "cu_seqlens_q ends with 5, but q has 2 rows"),
        ({"k_scale": torch.ones(5, 4, 2)}, "k_scale and v_scale go with int8 and float8_e4m3fn caches"),
        (both_caches(torch.int8), "k_scale and v_scale go with int8 and float8_e4m3fn caches .* the caches are int8"),
        (both_caches(torch.float8_e4m3fn), "k_scale and v_scale go with .* the caches are float8_e4m3fn"),
        ({**both_caches(torch.float8_e4m3fn), "k_scale": torch.ones(5, 4, 2)}, "the caches are float8_e4m3fn"),
        (
            {**both_caches(torch.float8_e5m2), "k_scale": torch.ones(5, 4, 2), "v_scale": torch.ones(5, 4, 2)},
            "k_cache has dtype float8_e5m2; accepted: float32, bfloat16, float16, int8, float8_e4m3fn",
        ),
    ],
)
def test_paged_attention(change, message):
    with pytest.raises(RuntimeError, match=f"paged_attention: .*{message}"):
        paged(**change)


def test_non_finite_values_reach_the_output():
    """A NaN is not silently masked away: it shows in the rows that see it, and only there."""
    q, k, v = qkv(batch=1)
    k[0, 4, 0, 0] = float("nan")
    out = ops.attention(q, k, v, causal=True)
    assert out[0, :4].isfinite().all()
    assert out[0, 4:, :2].isnan().all()  # the heads of KV head 0
    assert out[0, :, 2:].isfinite().all()


def test_block_mask_patterns():
    local = BlockMask.local(256, 256, 1)
    assert local.mask[0, 0].tolist() == [[abs(i - j) <= 1 for j in range(4)] for i in range(4)]
    assert BlockMask.global_(256, 256, 1).mask[0, 0].tolist() == [
        [i == 0 or j == 0 for j in range(4)] for i in range(4)
    ]
    assert BlockMask.strided(256, 256, 2).mask[0, 0].tolist() == [[j % 2 == 1 for j in range(4)]] * 4
    both = local & BlockMask.strided(256, 256, 2)
    assert both.mask[0, 0].sum() == 5
    assert (local | BlockMask.strided(256, 256, 2)).mask.sum() == 10 + 8 - 5
    # fewer queries than keys: the last query block stands at the last key block
    assert BlockMask.local(64, 256, 0).mask[0, 0].tolist() == [[False, False, False, True]]
    with pytest.raises(ValueError, match="64x64 cannot be combined with blocks of 64x32"):
        _ = local | BlockMask.local(256, 256, 1, block_k=32)
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        BlockMask(torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda: BlockMask.local(64, 64, -1), "width is -1; it must not be negative"),
        (lambda: BlockMask.global_(64, 64, -1), "count is -1; it must not be negative"),
        (lambda: BlockMask.strided(64, 64, 0), "stride is 0; it must be at least 1"),
        (lambda: BlockMask.local(-64, 64, 1), "num_q is -64; it must not be negative"),
        (lambda: BlockMask.local(64, 64, 1, block_q=0), "block sizes are 0 and 64; they must be at least 1"),
        (lambda: BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 4, -1), "block sizes are 4 and -1"),
    ],
)
def test_block_mask_refuses(pattern, message):
    with pytest.raises(ValueError, match=message):
        pattern()


def test_offsets_beyond_two_gigabytes():
    """A view whose last rows lie more than 2^31 elements into its parent (the pages in between are never touched)."""
    parent = torch.empty(3, 1 << 30, dtype=torch.bfloat16)
    rows = parent[:, :16].unflatten(1, (2, 8))[None]  # (1, 3, 2, 8), row stride 2^30
    rows.copy_(torch.randn(1, 3, 2, 8))
    assert torch.equal(ops.attention(rows, rows, rows), ops.attention(*[rows.contiguous()] * 3))


@pytest.mark.parametrize(("is_cuda", "head_dim", "kernel"), [(True, 577, False), (True, 576, True), (False, 577, True)])
def test_head_sizes_that_the_cuda_kernels_lack_take_the_reference(monkeypatch, recwarn, is_cuda, head_dim, kernel):
    module = sys.modules[ops.attention.__module__]
    monkeypatch.setattr(module, "use_kernel", lambda op, q: True)
    q = SimpleNamespace(is_cuda=is_cuda, shape=(1, 2, 3, head_dim))  # in place of a tensor on a GPU
    assert module._use_kernel("attention", q) == kernel
    refusal = "the cuda kernel of attention takes head sizes up to 576, not 577"
    assert [str(w.message) for w in recwarn] == ([] if kernel else [f"{refusal}; using the reference"])
    if not kernel:
        with llmcore.backend("kernel"), pytest.raises(RuntimeError, match=refusal):
            module._use_kernel("attention", q)
