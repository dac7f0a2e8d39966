"""What the registry's checks do not say of qk_norm_rope: against the separate ops, unused outputs, bad input."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops

QKV = torch.randn(6, 8 * 16, generator=torch.Generator().manual_seed(0))  # 4 query heads, 2 key and value heads
COS, SIN = ops.rope_tables(9, 16)
CALL = {
    "qkv": QKV, "num_heads": 4, "num_kv_heads": 2, "cos": COS, "sin": SIN,
    "positions": torch.tensor([0, 8, 3, 3, 1, 2]),
    "q_weight": torch.linspace(0.5, 2, 16), "k_weight": torch.linspace(-1, 1, 16),
}  # fmt: skip


def separately(qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight):
    q, k, v = qkv.unflatten(-1, (8, 16)).split((num_heads, num_kv_heads, num_kv_heads), -2)
    q, k = ops.rms_norm(q, q_weight), ops.rms_norm(k, k_weight)
    return ops.rope(q, cos, sin, positions), ops.rope(k, cos, sin, positions), v


@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1,), (2,), (1, 2)], ids=str)
def test_equals_separate_ops_whichever_outputs_are_used(used):
    """An output that goes unused has no gradient: its heads get zeros, its weight nothing."""
    gradients, names = [], ("qkv", "q_weight", "k_weight")
    for function in (ops.qk_norm_rope, separately):
        leaves = {name: CALL[name].clone().requires_grad_() for name in names}
        outputs = function(**CALL | leaves)
        loss = sum((outputs[i] * torch.arange(1, outputs[i].numel() + 1).view_as(outputs[i])).sum() for i in used)
        gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
        if function is ops.qk_norm_rope:
            fused = outputs
    torch.testing.assert_close(fused, outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_do_not_change_bits(threads):
    qkv, weight = torch.randn(2000, 8 * 16, requires_grad=True), torch.ones(16, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for n in (2, threads):
            torch.set_num_threads(n)
            outputs = ops.qk_norm_rope(qkv, 4, 2, q_weight=weight, k_weight=weight)
            results.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), (qkv, weight))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_v_does_not_keep_the_projection_alive():
    _, _, v = ops.qk_norm_rope(**CALL)
    assert v.untyped_storage().nbytes() == v.numel() * v.element_size()


BAD = [
    ({"num_heads": 0}, "num_heads is 0, num_kv_heads 2; accepted: 1 or more"),
    ({"num_kv_heads": 3}, r"qkv has shape \(6, 128\); expected .* features = 10 heads times head_dim"),
    ({"qkv": QKV[0]}, r"qkv has shape \(128,\)"),
    ({"qkv": QKV[:, :0]}, r"qkv has shape \(6, 0\)"),
    ({"sin": None}, "sin is missing, but cos is given; they go together"),
    ({"sin": SIN[:8]}, r"cos has shape \(9, 8\), but sin has \(8, 8\)"),
    ({"cos": torch.ones(9, 9), "sin": torch.ones(9, 9)}, "but qkv's head_dim is 16; rotary_dim must not exceed it"),
    (
        {"positions": torch.tensor([0, 1, 2, 9, 4, 5])},
        r"position 9 \(token 3\) is outside the cos/sin table of length 9",
    ),
    ({"positions": torch.arange(5)}, r"positions has shape \(5,\)"),
    ({"q_weight": torch.ones(15)}, r"q_weight has shape \(15,\)"),
    ({"k_weight": torch.ones(16).half()}, "k_weight has dtype float16"),
    ({"eps": -1.0}, "eps is -1; it must not be negative"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    with pytest.raises(RuntimeError, match=f"qk_norm_rope: .*{message}"):
        ops.qk_norm_rope(**CALL | change)


def test_positions_beyond_the_tables_without_positions():
    with pytest.raises(RuntimeError, match=r"position 9 \(the last of 10 tokens\)"):
        ops.qk_norm_rope(torch.zeros(10, 128), 4, 2, COS, SIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BAD[:1], *BAD[4:],
        ({"qkv": QKV[None]}, r"qkv has shape \(1, 6, 128\); expected \(tokens, features\)"),
        ({"slot_mapping": torch.tensor([0, 1, 2, 2, 3, 4])}, "slot 2 is given to more than one token"),
        ({"slot_mapping": torch.tensor([0, 1, 2, 8, 3, 4])}, r"slot 8 \(token 3\) is outside the cache of 8 slots"),
        ({"k_scale": torch.ones(2, 4, 2)}, "k_scale is given, but the cache has dtype float32"),
        ({"v_cache": torch.zeros(2, 4, 2, 15)}, r"v_cache has shape \(2, 4, 2, 15\)"),
    ],
)  # fmt: skip
def test_bad_input_writes_nothing(change, message):
    call = CALL | {
        "k_cache": torch.zeros(2, 4, 2, 16), "v_cache": torch.zeros(2, 4, 2, 16), "slot_mapping": torch.arange(6),
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=f"qk_norm_rope_cache_write: .*{message}"):
        ops.qk_norm_rope_cache_write(**call)
    assert not call["k_cache"].any()
    assert not call["v_cache"].any()


def test_backward_refuses_what_does_not_fit():
    call = [torch.zeros(6, 4, 16), torch.zeros(6, 2, 16), torch.zeros(6, 2, 16), QKV, 4, 2, None, None, None]
    weights = [CALL["q_weight"], None, 1e-6, False]
    backward = torch.ops.llmcore.qk_norm_rope_backward
    with pytest.raises(RuntimeError, match="qkv is missing; the gradient of a norm needs it"):
        backward(*call[:3], None, *call[4:], *weights)
    with pytest.raises(RuntimeError, match="at least one is needed"):
        backward(None, None, None, *call[3:], *weights)
    with pytest.raises(RuntimeError, match=r"dk has shape \(6, 4, 16\)"):
        backward(call[0], call[0], *call[2:], *weights)
    with pytest.raises(RuntimeError, match=r"qkv has shape \(6, 112\)"):
        backward(*call[:3], QKV[:, :112], *call[4:], *weights)


def test_the_cache_write_refuses_gradients():
    caches = torch.zeros(2, 2, 4, 2, 16)
    qkv = QKV.clone().requires_grad_()
    q = ops.qk_norm_rope_cache_write(qkv, 4, 2, *caches, torch.arange(6))
    with pytest.raises(NotImplementedError, match="qk_norm_rope_cache_write has no gradient"):
        q.sum().backward()
