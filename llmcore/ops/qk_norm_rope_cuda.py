"""qk_norm_rope on CUDA devices: a composition of rms_norm, rope and kv_cache_write, which have kernels there. Between
them values are rounded to the tensors' dtype, as they were in separate layers. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.llmcore


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return qkv.unflatten(-1, (sum(heads), -1)).split(heads, dim=-2)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _norm_rope(x: Tensor, weight: Tensor | None, cos, sin, positions, eps: float, interleaved: bool) -> Tensor:
    if weight is not None:
        x = _ops.rms_norm(x, weight, None, eps)[0]
    if cos is not None:
        return _ops.rope(x, cos, sin, positions, interleaved, False)
    return x if weight is not None else _copy(x)


def qk_norm_rope(qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved):
    _ops.qk_norm_rope_check("qk_norm_rope", qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps)
    q, k, v = _split(qkv, num_heads, num_kv_heads)
    rest = (cos, sin, positions, eps, interleaved)
    return _norm_rope(q, q_weight, *rest), _norm_rope(k, k_weight, *rest), _copy(v)


def _backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, cos, sin, positions, eps: float, interleaved: bool):
    """(dx, dweight) of one head group."""
    if cos is not None:
        dy = _ops.rope(dy, cos, sin, positions, interleaved, True)
    if weight is None:
        return dy, dy.new_empty(0)
    rstd = (x.float().square().mean(-1) + eps).rsqrt().flatten()
    return _ops.rms_norm_backward(dy, None, x, weight, rstd)


def qk_norm_rope_backward(
    dq, dk, dv, qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved
):
    like = next(d for d in (dq, dk, dv) if d is not None)
    shape = like.shape[:-2]

    def present(d: Tensor | None, heads: int) -> Tensor:
        return like.new_zeros(*shape, heads, like.shape[-1]) if d is None else d

    q, k, _ = (None, None, None) if qkv is None else _split(qkv, num_heads, num_kv_heads)
    rest = (cos, sin, positions, eps, interleaved)
    dq, dq_weight = _backward(present(dq, num_heads), q, q_weight, *rest)
    dk, dk_weight = _backward(present(dk, num_kv_heads), k, k_weight, *rest)
    return torch.cat((dq, dk, present(dv, num_kv_heads)), -2).flatten(-2), dq_weight, dk_weight


def qk_norm_rope_cache_write(
    qkv, num_heads, num_kv_heads, k_cache, v_cache, slot_mapping, cos, sin, positions, q_weight, k_weight, eps,
    interleaved, k_scale, v_scale,
):  # fmt: skip
    _ops.qk_norm_rope_check(
        "qk_norm_rope_cache_write", qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps
    )
    q, k, v = _split(qkv, num_heads, num_kv_heads)
    rest = (cos, sin, positions, eps, interleaved)
    _ops.kv_cache_write(_norm_rope(k, k_weight, *rest), v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return _norm_rope(q, q_weight, *rest)


IMPLEMENTATIONS = {
    function.__name__: function for function in (qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_cache_write)
}
for _name, _function in IMPLEMENTATIONS.items():
    torch.library.impl(f"llmcore::{_name}", "CUDA", _function)
