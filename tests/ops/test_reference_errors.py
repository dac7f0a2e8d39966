"""The references (which float64 takes) refuse what would broadcast or wrap around into wrong numbers."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops


def f64(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(**change):
    return ops.attention(**{"q": f64(6, 4, 8), "k": f64(6, 2, 8), "v": f64(6, 2, 8), **change})


def paged(**change):
    cache = torch.ones(5, 4, 2, 8)
    call = {"q": f64(2, 4, 8), "block_table": ints([0, 1], [2, 9]), "kv_lens": ints(8, 4)}
    return ops.paged_attention(**{"k_cache": cache, "v_cache": cache, **call, **change})


def rope(x, **change):
    cos, sin = ops.rope_tables(8, 4)
    return ops.rope(x, **{"cos": cos, "sin": sin, **change})


def write(**change):
    call = {"k": f64(3, 2, 8), "v": f64(3, 2, 8), "slot_mapping": torch.arange(3)}
    return ops.kv_cache_write(
        **{**call, "k_cache": torch.zeros(2, 4, 2, 8), "v_cache": torch.zeros(2, 4, 2, 8), **change}
    )


CASES = [
    (lambda: packed(), "expected .batch, seq, heads, head_dim."),
    (lambda: packed(cu_seqlens_q=ints(0, -3, 6)), r"cu_seqlens_q is \[0, -3, 6\]; expected offsets"),
    (lambda: packed(cu_seqlens_q=ints(0, 3)), "end with 6"),
    (lambda: packed(cu_seqlens_q=ints(0, 6), cu_seqlens_k=ints(0, 3, 6)), r"cu_seqlens_k has shape \(3,\)"),
    (lambda: packed(cu_seqlens_q=ints(0, 6), q=f64(6, 3, 8)), "heads of q must be a multiple"),
    (lambda: ops.attention(f64(2, 6, 4, 8), f64(1, 6, 2, 8), f64(1, 6, 2, 8)), r"\(1, 6, 2, 8\); expected"),
    (lambda: paged(block_table=ints([0, -1], [2, 9])), "block_table holds -1; accepted: 0 to 4"),
    (lambda: paged(kv_lens=ints(8, 5)), "block_table holds 9"),
    (lambda: paged(kv_lens=ints(9, 4)), "kv_lens holds 9; accepted: 0 to 8"),
    (lambda: paged(q=f64(3, 4, 8)), "end with 3"),
    (
        lambda: paged(k_scale=torch.ones(5, 4, 2)),
        "scales go with int8 and float8_e4m3fn caches; the caches have torch.float32",
    ),
    (lambda: ops.rms_norm(f64(3, 8), f64(1)), r"weight has shape \(1,\); expected \(8,\)"),
    (lambda: ops.rms_norm(f64(3, 8), f64(8), residual=f64(1, 8)), r"residual has shape \(1, 8\)"),
    (lambda: ops.layer_norm(f64(3, 8), f64(8), f64(1)), r"bias has shape \(1,\)"),
    (lambda: ops.dyt(f64(3, 8), f64(1), f64(1)), r"weight has shape \(1,\)"),
    (lambda: ops.swiglu(f64(3, 8), f64(1, 8)), r"up has shape \(1, 8\)"),
    (lambda: ops.geglu(f64(3, 8), f64(1, 8)), r"up has shape \(1, 8\)"),
    (lambda: rope(f64(2, 3, 1, 2)), "rotary_dim is 4; it must not exceed head_dim, 2"),
    (lambda: rope(f64(2, 3, 1, 4), positions=torch.arange(3)), r"positions has shape \(3,\); expected \(2, 3\)"),
    (lambda: rope(f64(2, 3, 1, 4), sin=torch.ones(8, 1)), r"sin has shape \(8, 1\); expected \(8, 2\)"),
    (lambda: rope(f64(2, 4)), r"x has shape \(2, 4\); expected \(batch, seq, heads, head_dim\)"),
    (lambda: ops.moe_route(f64(3, 6), 7), "top_k is 7"),
    (lambda: ops.moe_route(f64(3, 6), 4, num_groups=3, topk_groups=1), "the chosen groups must hold top_k"),
    (lambda: ops.moe_route(f64(3, 6), 1, bias=torch.zeros(1)), r"bias has shape \(1,\); expected \(6,\)"),
    (lambda: ops.moe_dispatch(f64(4, 4), ints([0], [0], [1]), 2), r"x has shape \(4, 4\); expected \(3, 4\)"),
    (lambda: ops.moe_dispatch(f64(3, 4), ints([0], [-1], [1]), 2), "experts holds -1; accepted: 0 to 1"),
    (lambda: ops.moe_combine(f64(2, 4), torch.ones(2, 1), ints([0], [-1])), "row_of holds -1; accepted: 0 to 1"),
    (lambda: ops.moe_combine(f64(2, 4), torch.ones(2, 1), ints([0], [0])), "must be a permutation"),
    (lambda: ops.moe_combine(f64(2, 4), torch.ones(1, 1), ints([0], [1])), r"weights has shape \(1, 1\)"),
    (lambda: ops.grouped_gemm(f64(3, 4), f64(1, 5, 4), ints(1, 4)), "start with 0"),
    (lambda: ops.grouped_gemm(f64(3, 4), f64(3, 5, 4), ints(0, 3)), r"offsets has shape \(2,\); expected \(4,\)"),
    (
        lambda: ops.grouped_gemm(f64(2, 4), f64(1, 5, 4), ints(0, 2), token_of=ints(0, 1)),
        "token_of and row_of go together",
    ),
    (
        lambda: ops.grouped_gemm(f64(2, 4), f64(1, 5, 4), ints(0, 2), token_of=ints(0, 1), row_of=ints([1], [0])),
        "token_of and row_of do not agree",
    ),
    (
        lambda: ops.grouped_gemm(f64(2, 4), f64(1, 5, 4), ints(0, 2), token_of=ints(0, 1), row_of=ints([0], [-1])),
        "row_of holds -1; accepted: 0 to 1",
    ),
    (lambda: ops.grouped_glu(f64(2, 4), f64(1, 5, 4), ints(0, 2)), r"gate_up has shape \(1, 5, 4\)"),
    (lambda: ops.grouped_glu(f64(2, 4), f64(1, 6, 4), ints(0, 2), activation="relu"), "activation is 'relu'"),
    (lambda: write(k=f64(3, 1, 8), v=f64(3, 1, 8)), r"k_cache has shape \(2, 4, 2, 8\); expected \(2, 4, 1, 8\)"),
    (lambda: write(v=f64(2, 2, 8)), r"v has shape \(2, 2, 8\); expected \(3, 2, 8\)"),
    (lambda: write(slot_mapping=torch.arange(1)), r"slot_mapping has shape \(1,\); expected \(3,\)"),
    (lambda: write(k_scale=torch.ones(2, 4, 2)), "k_scale goes with int8 and float8_e4m3fn caches"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_reference_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
