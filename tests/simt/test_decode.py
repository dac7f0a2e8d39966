"""Decode attention on the emulator beyond the registry's samples: shapes that choose each of its tiles, caches of every
kind, and rows that nobody may read."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore import reference
from llmcore.ops import registry
from llmcore.ops.registry import HALVES, Sample
from tests.ops.checks import check_sample
from tests.simt.emulation import MODES, emulator


def paged(
    label,
    lens,
    heads,
    kv_heads,
    dim,
    block_size,
    *,
    v_dim=None,
    dtype=torch.bfloat16,
    cache=None,
    latent=False,
    spare_columns=0,
    queries=None,
    **kwargs,
):
    """A call whose cache holds NaN wherever no sequence has a key, and whose table ends in ids beyond the cache.

    latent: v is the first columns of k's memory. spare_columns: between the rows of the cache, so that they are not
    aligned."""
    make = torch.Generator().manual_seed(len(label))
    v_dim, cache = v_dim or dim, cache or dtype
    blocks = [-(-n // block_size) for n in lens]
    num_blocks = sum(blocks) + 1
    order = torch.randperm(num_blocks, generator=make)
    table = torch.full((len(lens), max(blocks) + 1), 2147480000, dtype=torch.int32)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    start = 0
    for row, (n, count) in enumerate(zip(lens, blocks)):
        ids = order[start : start + count]
        table[row, :count] = ids.int()
        used[ids] = (torch.arange(count * block_size) < n).view(count, block_size)
        start += count

    def new_cache(columns):
        values = torch.randn(num_blocks, block_size, kv_heads, columns + spare_columns, generator=make)
        if cache in reference.LARGEST_ELEMENT:
            values, scale = reference.quantise(values, cache)
            values.view(torch.uint8)[~used] = 0x7F  # the largest int8, and NaN of fp8
            scale[~used] = torch.nan
            return values[..., :columns], scale
        values = values.to(cache)
        values[~used] = torch.nan
        return values[..., :columns], None

    k, k_scale = new_cache(dim)
    v, v_scale = (k[..., :v_dim], k_scale) if latent else new_cache(v_dim)
    if cache in reference.LARGEST_ELEMENT:
        kwargs |= {"k_scale": k_scale, "v_scale": v_scale}
    if queries:
        kwargs["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
    if kwargs.get("sinks"):
        kwargs["sinks"] = torch.randn(heads, generator=make)
    q = torch.randn(sum(queries or [1] * len(lens)), heads, dim, generator=make).to(dtype)
    return Sample(label, (q, k, v, table, torch.tensor(lens, dtype=torch.int32)), kwargs, poison=True)


def samples():
    f16, i8, f8 = torch.float16, torch.int8, torch.float8_e4m3fn
    yield paged("MLA, v in k", [70, 33], 16, 1, 576, 64, v_dim=512, latent=True)
    yield paged("MLA, v in k, 64 heads", [70], 64, 1, 576, 16, v_dim=512, latent=True)
    yield paged("MLA, 64 heads", [40], 64, 1, 576, 16, v_dim=512)
    for cache in (i8, f8):
        yield paged(f"MLA, v in k, {cache}", [70], 16, 1, 576, 16, v_dim=512, latent=True, cache=cache)
        yield paged(f"MLA, v in k, {cache}, 64 heads", [40], 64, 1, 576, 16, v_dim=512, latent=True, cache=cache)
        yield paged(f"MLA, {cache}", [40], 16, 1, 576, 16, v_dim=512, cache=cache)
        yield paged(f"MLA, {cache}, 64 heads", [40], 64, 1, 576, 16, v_dim=512, cache=cache)
    # More rows than a tile has: as many tiles as it takes.
    yield paged("MLA, v in k, 128 heads", [70], 128, 1, 576, 16, v_dim=512, latent=True)
    yield paged("MLA, v in k, 128 heads, one split", [30], 128, 1, 576, 16, v_dim=512, latent=True, sinks=True)
    yield paged("MLA, v in k, int8, 128 heads", [40], 128, 1, 576, 16, v_dim=512, latent=True, cache=i8)
    yield paged("MLA, 128 heads", [40], 128, 1, 576, 7, v_dim=512)
    yield paged("MLA, v in k, 20 heads, chunks", [50, 40], 20, 1, 576, 16, v_dim=512, latent=True, queries=[6, 1])
    yield paged("GQA 128:1", [150], 128, 1, 128, 16, sinks=True)
    yield paged("GQA 128:1, int8, window", [150], 128, 1, 128, 5, cache=i8, window=70)
    yield paged("GQA 72:1, 2 KV heads", [80], 144, 2, 64, 16)
    yield paged("GQA 8:1, uneven lengths", [1, 200, 0, 65], 16, 2, 128, 16)
    yield paged("many splits", [700], 8, 1, 128, 16, dtype=f16)
    yield paged("short sequence, long table", [70, 600, 1], 4, 1, 64, 16, sinks=True)
    for dim, v_dim in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72), (111, 59), (300, 20)):
        for heads in (4, 40):
            for cache in (None, i8, f8):
                yield paged(f"{dim}/{v_dim}, {heads} heads, {cache}", [90], heads, 1, dim, 16, v_dim=v_dim, cache=cache)
    yield paged("page of 1", [67, 3], 6, 2, 64, 1, dtype=f16)
    yield paged("page of 7", [67, 140], 6, 2, 64, 7)
    yield paged("page of 7, int8", [67, 140], 6, 2, 64, 7, cache=i8, dtype=f16)
    yield paged("page of 7, fp8", [67, 140], 6, 2, 64, 7, cache=f8, dtype=f16)
    yield paged("page of 300", [67, 140], 6, 2, 64, 300)
    yield paged("window", [300, 20, 130], 8, 2, 64, 16, window=100)
    yield paged("window, not causal, sinks", [300, 20, 130], 8, 2, 64, 16, window=33, causal=False, sinks=True)
    yield paged("soft cap, int8", [100], 8, 2, 64, 16, softcap=3.0, cache=i8, dtype=f16)
    yield paged("soft cap, fp8", [100], 8, 2, 64, 16, softcap=3.0, cache=f8, dtype=f16)
    yield paged("negative scale", [100], 4, 2, 64, 16, scale=-0.3)
    for dtype in HALVES:
        for cache in (torch.float32, *HALVES, i8, f8):
            yield paged(f"{dtype} over {cache}", [90], 4, 1, 64, 16, dtype=dtype, cache=cache)
            yield paged(
                f"{dtype} over {cache}, unaligned", [70], 4, 1, 60, 16, dtype=dtype, cache=cache, spare_columns=3
            )
    yield paged("cu_seqlens", [40, 90, 7], 8, 2, 64, 16, queries=[1, 1, 1])
    # Several queries for each sequence: which tile is whose is found on the device.
    yield paged("two to eight queries", [40, 90, 7, 65], 8, 2, 64, 16, queries=[8, 2, 3, 5])
    yield paged("a chunk and single queries", [90, 33, 20], 8, 1, 64, 7, queries=[17, 1, 1], sinks=True)
    yield paged("chunks, window, int8", [90, 33], 8, 2, 64, 16, queries=[9, 4], window=20, cache=i8)
    yield paged("chunks, not causal", [90, 33], 8, 2, 64, 16, queries=[9, 4], causal=False)
    yield paged("more than 32 sequences", [3, 9] * 18, 4, 1, 64, 4, queries=[0, 1, 3, 4] * 9)
    # All keys in one split: no partial sums.
    yield paged("one split", [16, 1, 0, 9], 8, 2, 64, 8, sinks=True)
    yield paged("one split, many sequences", [150, 1, 0, 70, 3, 65, 64, 40], 4, 1, 64, 16)
    yield paged("one split, odd columns", [16, 9], 8, 2, 64, 8, v_dim=59)
    yield paged("one split, int8", [16, 9], 8, 2, 128, 8, cache=i8, dtype=f16)
    yield paged("one split, int8, odd columns", [16, 9], 8, 2, 111, 8, v_dim=77, cache=i8)
    yield paged("one split, wide v", [16, 9], 40, 1, 256, 8, v_dim=250)
    yield paged("one split, chunks", [16, 9], 8, 2, 64, 8, queries=[5, 3], sinks=True)
    # As many rows as sequences, though not one each: the decode kernel cannot know, and must still be right.
    yield paged("cu_seqlens, uneven", [40, 90, 7, 2, 5], 8, 1, 64, 16, queries=[0, 4, 1, 0, 0])
    yield paged("more queries than keys", [3, 0, 0, 0], 8, 1, 64, 16, queries=[4, 0, 0, 0], sinks=True)


def check(sample):
    """Also that the decode kernel served the call, and without bank conflicts."""
    before = llmcore._C.emulator_counters()
    with llmcore.backend("kernel"), torch.random.fork_rng():
        check_sample(registry["paged_attention"], sample)
    after = llmcore._C.emulator_counters()
    done = {name: after[name] - before[name] for name in after}
    assert done["mma"] > 0, "the portable kernel was taken"
    assert done["ldmatrix_wavefronts"] == done["ldmatrix_matrices"]


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.label) for s in samples()])
def test_decode_matches_reference(sample, emulated):
    check(sample)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache", [None, torch.int8, torch.float8_e4m3fn])
def test_values_of_any_size(dtype, cache, emulated):
    for factor in (1e-3, 1e3):
        sample = paged("sizes", [90], 4, 1, 64, 16, dtype=dtype, cache=cache)
        if cache in reference.LARGEST_ELEMENT:
            sample.kwargs["v_scale"].mul_(factor)
        else:
            sample.args[2].mul_(factor)
        check(sample)


FP8_NUMBERS = torch.tensor([c for c in range(256) if c % 128 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn)


def one_block(*rows):
    """A cache of one block and KV head that holds the rows."""
    return torch.stack(rows)[None, :, None]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_fp8_number_as_a_value(dtype, emulated):
    cache = one_block(torch.nn.functional.pad(FP8_NUMBERS.view(torch.uint8), (0, 2)).view(FP8_NUMBERS.dtype))
    scale, lens = torch.full((1, 1, 1), 0.5), torch.ones(1, dtype=torch.int32)
    with llmcore.backend("kernel"):
        out = registry["paged_attention"].op(
            torch.zeros(1, 1, 256, dtype=dtype), cache, cache, lens[None] - 1, lens, k_scale=scale, v_scale=scale
        )
    assert torch.equal(out[0, 0], (cache[0, 0, 0].float() * 0.5).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("numbers", FP8_NUMBERS.split(16), ids=lambda x: f"{x[0].item():g}")
def test_every_fp8_number_in_a_key(dtype, numbers):
    """Head i's query picks number i of the first key and makes a score of 1 of it; the other key's is 0."""
    key = torch.zeros(64, dtype=numbers.dtype)
    key[: len(numbers)] = numbers
    value = torch.full((64,), 1.0).to(numbers.dtype)
    zeros = torch.zeros_like(key)
    x = numbers.to(torch.float32)
    q = torch.nn.functional.pad(torch.where(x == 0, 1, 1 / x).diag(), (0, 64 - len(x)))[None].to(dtype)
    lens, ones = torch.full((1,), 2, dtype=torch.int32), torch.ones(1, 2, 1)
    args = (q, one_block(key, zeros), one_block(value, zeros), lens[None] - 2, lens)
    with emulator():
        check(Sample("fp8 key", args, {"scale": 1.0, "k_scale": ones, "v_scale": ones}))


def test_nan_in_a_key_reaches_its_rows_alone(emulated):
    sample = paged("NaN", [70, 40], 4, 2, 64, 16)
    _, k, _, table, _ = sample.args
    k[table[0, 2], 3, 0] = torch.nan
    with llmcore.backend("kernel"):
        out = registry["paged_attention"].op(*sample.args, **sample.kwargs)
    nan = out.isnan()
    assert nan[0, :2].all()
    assert not nan[0, 2:].any()
    assert not nan[1].any()


def test_same_bits_under_every_schedule():
    sample = paged("bits", [500, 90], 8, 2, 64, 16)
    outs = []
    for mode in MODES:
        with emulator(*mode), llmcore.backend("kernel"):
            outs.append(registry["paged_attention"].op(*sample.args, **sample.kwargs))
    assert all(torch.equal(outs[0], out) for out in outs)
