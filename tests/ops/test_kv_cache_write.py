"""What the registry's checks do not say of kv_cache_write: quantisation's meaning, untouched slots, bad input."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import kv_cache_write, paged_attention


def caches_of(dtype, blocks=3, block_size=4, heads=2, dim=16):
    caches = [torch.full((blocks, block_size, heads, dim), -9, dtype=dtype) for _ in range(2)]
    return caches, {name: torch.full((blocks, block_size, heads), -9.0) for name in ("k_scale", "v_scale")}


F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (F8, 448)])
def test_reads_back_within_half_a_step(dtype, largest, isa):
    (k_cache, v_cache), scales = caches_of(dtype, dim=59)
    k, v = torch.randn(2, 5, 2, 59)
    slots = torch.tensor([11, 0, 5, 3, 7])
    kv_cache_write(k, v, k_cache, v_cache, slots, **scales)
    for new, cache, scale in ((k, k_cache, scales["k_scale"]), (v, v_cache, scales["v_scale"])):
        unit = scale.flatten(0, 1)[slots].unsqueeze(-1)
        assert torch.allclose(unit, new.abs().amax(-1, keepdim=True) / largest)
        elements = cache.flatten(0, 1)[slots].float()
        # an fp8 has 3 bits behind the leading one, and none below 2^-9
        step = torch.ones(()) if dtype == torch.int8 else 2 ** ((new / unit).abs().log2().floor().clamp(min=-6) - 3)
        assert ((elements * unit - new).abs() <= step * unit * 0.5 * (1 + 1e-5)).all()
        untouched = torch.ones(12, dtype=torch.bool)
        untouched[slots] = False
        assert (cache.flatten(0, 1)[untouched].float() == -9).all()
        assert (scale.flatten(0, 1)[untouched] == -9).all()


@pytest.mark.parametrize("dtype", [torch.int8, F8])
def test_special_rows(dtype, isa):
    """Zeros read back as exact zeros; a non-finite row as NaN, not as some finite number; subnormals stay in range."""
    (k_cache, v_cache), scales = caches_of(dtype, dim=19)
    k = torch.randn(5, 2, 19)
    k[0] = 0
    k[1, 0, 18] = torch.inf
    k[1, 1, 3] = torch.nan
    k[2] = torch.linspace(-3e-43, 3e-43, 19)
    kv_cache_write(k, k, k_cache, v_cache, torch.arange(5), **scales)
    assert (k_cache.view(torch.uint8).flatten(0, 1)[:2] == 0).all()
    read = (k_cache.float() * scales["k_scale"].unsqueeze(-1)).flatten(0, 1)
    assert torch.equal(read[0], torch.zeros(2, 19))
    assert torch.isnan(read[1]).all()
    assert (read[2].abs() <= 4e-43).all()
    assert torch.isfinite(read[3:5]).all()


def ties_of_fp8():
    """All numbers of fp8 (with scale 1), those halfway between two of them, and the floats next to these."""
    exact = torch.arange(0x7F, dtype=torch.uint8).view(F8).float()
    middle = (exact[1:] + exact[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (torch.inf, 0.0))
    return torch.cat([exact, middle, up, down])


def test_fp8_rounds_to_nearest_even(isa):
    """Each number to the code whose value is nearest, found by going through all codes."""
    x = ties_of_fp8()
    x = torch.stack([x, -x])[None]
    (k_cache, v_cache), scales = caches_of(F8, 1, 1, 2, x.shape[-1])
    kv_cache_write(x, x, k_cache, v_cache, torch.tensor([0]), **scales)
    assert (scales["k_scale"] == 1).all()
    codes = torch.arange(0x7F)
    distance = (x.abs().double()[..., None] - codes.to(torch.uint8).view(F8).double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    best = (nearest * (2 - codes % 2)).argmax(-1)  # of two equally near, the even one
    assert torch.equal(k_cache[0].view(torch.uint8).long(), best + 128 * torch.signbit(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_codes_mean_what_torch_says(dtype, isa):
    """Attention to one key reads its value back: every code, times a scale."""
    v_cache = torch.arange(256, dtype=torch.uint8).view(F8).view(1, 1, 1, 256)
    k_cache = torch.zeros(1, 1, 1, 8, dtype=F8)
    scale = torch.full((1, 1, 1), 0.25)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = paged_attention(torch.ones(1, 1, 8, dtype=dtype), k_cache, v_cache, table, lens, k_scale=scale, v_scale=scale)
    expected = (v_cache.float() * 0.25).to(dtype).flatten()
    numbers = ~expected.isnan()
    assert torch.equal(out.flatten()[numbers], expected[numbers])
    if isa != "cuda_emulated":  # whose decode kernel takes NaN for 480
        assert out.flatten()[~numbers].isnan().all()


def test_all_dtypes_agree_with_torch_conversion(isa):
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for source in floats:
        for target in floats:
            k = (torch.randn(3, 2, 21) * 100).to(source)
            caches = torch.zeros(2, 2, 2, 2, 21, dtype=target)
            kv_cache_write(k, -k, caches[0], caches[1], torch.tensor([3, 0, 2], dtype=torch.int32))
            for cache, new in zip(caches, (k, -k)):
                assert torch.equal(cache.flatten(0, 1)[[3, 0, 2]], new.to(target))
                assert (cache.flatten(0, 1)[1] == 0).all()


def test_one_cache_tensor_for_both():
    """k_cache and v_cache as the two halves of one allocation, blocks outermost."""
    both = torch.zeros(3, 2, 4, 2, 8)
    k, v = torch.randn(2, 3, 2, 8)
    kv_cache_write(k, v, both[:, 0], both[:, 1], torch.tensor([9, 1, 4]))
    assert torch.equal(both[2, 0, 1], k[0])
    assert torch.equal(both[0, 1, 1], v[1])
    assert both.count_nonzero() == k.numel() + v.numel()


def test_offsets_past_2_31():
    """The last slots of a cache of more than 2^31 elements (pages that are not written are never touched)."""
    blocks = 2**31 // (16 * 8 * 128) + 2
    try:
        k_cache, v_cache = (torch.empty(blocks, 16, 8, 128, dtype=torch.int8) for _ in range(2))
    except RuntimeError:
        pytest.skip("no address space for 4.3 GB")
    scales = {name: torch.empty(blocks, 16, 8) for name in ("k_scale", "v_scale")}
    k = torch.randn(2, 8, 128)
    kv_cache_write(k, 2 * k, k_cache, v_cache, torch.tensor([blocks * 16 - 1, 3]), **scales)
    for new, cache, scale in ((k, k_cache, scales["k_scale"]), (2 * k, v_cache, scales["v_scale"])):
        assert torch.allclose(cache[-1, -1] * scale[-1, -1, :, None], new[0], atol=0.05)
        assert torch.allclose(cache[0, 3] * scale[0, 3, :, None], new[1], atol=0.05)


K, V = torch.randn(3, 2, 16), torch.randn(3, 2, 8)
CACHE = torch.zeros(4, 5, 2, 16)
V_CACHE = torch.zeros(4, 5, 2, 8)
SCALE = torch.zeros(4, 5, 2)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 20, 1], r"slot 20 \(token 1\) is outside the cache of 20 slots; accepted: 0 to 19, or -1"),
        ([0, 1, -2], r"slot -2 \(token 2\) is outside the cache of 20 slots"),
        ([0, 2147480000, 1], r"slot 2147480000 \(token 1\)"),
        ([0, 2**62, 1], rf"slot {2**62} \(token 1\)"),
        ([7, 3, 7], "slot 7 is given to more than one token"),
    ],
)
def test_bad_slots_write_nothing(slots, message, backend):
    k_cache, v_cache = CACHE.clone(), V_CACHE.clone()
    with llmcore.backend(backend), pytest.raises(RuntimeError, match=message):
        kv_cache_write(K, V, k_cache, v_cache, torch.tensor(slots))
    assert k_cache.count_nonzero() == v_cache.count_nonzero() == 0


def test_many_tokens_may_be_skipped():
    k_cache, v_cache = CACHE.clone(), V_CACHE.clone()
    kv_cache_write(K, V, k_cache, v_cache, torch.tensor([-1, 6, -1]))
    assert torch.equal(k_cache[1, 1], K[1])
    assert k_cache.count_nonzero() == K[1].numel()
    kv_cache_write(K, V, torch.zeros(0, 5, 2, 16), torch.zeros(0, 5, 2, 8), torch.full((3,), -1))


INT8 = {"k_cache": CACHE.to(torch.int8), "v_cache": V_CACHE.to(torch.int8)}
FP8 = {"k_cache": CACHE.to(F8), "v_cache": V_CACHE.to(F8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": K[0]}, r"k has shape \(2, 16\); expected \(tokens, kv_heads, head_dim\)"),
        ({"k": K.double()}, "k has dtype float64; accepted: float32, bfloat16, float16"),
        ({"v": V.half()}, "v has dtype float16, but k has float32"),
        ({"v": V[:2]}, r"v has shape \(2, 2, 8\); expected \(3, 2, 8\)"),
        ({"k_cache": CACHE[0]}, r"k_cache has shape \(5, 2, 16\); expected \(num_blocks, block_size"),
        ({"k_cache": CACHE[..., :15]}, r"k_cache has shape \(4, 5, 2, 15\); expected \(4, 5, 2, 16\)"),
        ({"k_cache": CACHE[:, :, :1]}, r"k_cache has shape \(4, 5, 1, 16\); expected \(4, 5, 2, 16\)"),
        (
            {"k_cache": CACHE.to(torch.uint8)},
            "k_cache has dtype uint8; accepted: float32, bfloat16, float16, int8, float8",
        ),
        ({"v_cache": V_CACHE.half()}, "v_cache has dtype float16, but k_cache has float32"),
        ({"v_cache": V_CACHE[:3]}, r"v_cache has shape \(3, 5, 2, 8\); expected \(4, 5, 2, 8\)"),
        ({"k_cache": torch.zeros(4, 5, 2, 32)[..., ::2]}, "k_cache has stride 2 in its last dimension"),
        ({"k_cache": CACHE[:1].expand(4, 5, 2, 16)}, "k_cache has overlapping elements"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, r"slot_mapping has shape \(2,\); expected \(3\)"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping has dtype float32; accepted: int32, int64"),
        ({"k_scale": SCALE}, "k_scale is given, but the cache has dtype float32; int8 and float8_e4m3fn caches have"),
        (INT8, "k_scale is missing, but the cache has dtype int8; int8 and float8_e4m3fn caches have scales"),
        ({**INT8, "k_scale": SCALE}, "v_scale is missing, but the cache has dtype int8"),
        (FP8, "k_scale is missing, but the cache has dtype float8_e4m3fn"),
        ({**FP8, "v_cache": INT8["v_cache"]}, "v_cache has dtype int8, but k_cache has float8_e4m3fn"),
        ({**INT8, "k_scale": SCALE.half(), "v_scale": SCALE}, "k_scale has dtype float16; expected float32"),
        ({**INT8, "k_scale": SCALE, "v_scale": SCALE[:1]}, r"v_scale has shape \(1, 5, 2\); expected \(4, 5, 2\)"),
    ],
)
def test_bad_input(change, message):
    call = {"k": K, "v": V, "k_cache": CACHE, "v_cache": V_CACHE, "slot_mapping": torch.arange(3), **change}
    call = {"k_scale": None, "v_scale": None, **call}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.kv_cache_write(**call)
    assert call["k_cache"].float().count_nonzero() == 0
