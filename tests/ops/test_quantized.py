"""Quantised weights beyond the registry's samples: the formats against the `gguf` package, layouts, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcore.reference import quantized
from llmcore.reference.quantized import FORMATS

gguf = pytest.importorskip("gguf")


def gguf_type(name: str):
    return getattr(gguf.GGMLQuantizationType, name[:3].upper() + name[3:].upper())


def any_blocks(name: str, n: int, k: int, seed: int = 0) -> Tensor:
    """Every bit pattern but scales that are not finite."""
    make = torch.Generator().manual_seed(seed)
    f = FORMATS[name]
    fields = quantized.fields_of_blocks(
        torch.randint(0, 256, (n, k // f.block * f.bytes), dtype=torch.uint8, generator=make), f
    )
    fields.d = torch.randn(fields.d.shape, generator=make).half()
    if f.has_min:
        fields.m = torch.randn(fields.m.shape, generator=make).half()
    return quantized.blocks_of_fields(fields, f)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_ggufs(name):
    assert gguf.GGML_QUANT_SIZES[gguf_type(name)] == (FORMATS[name].block, FORMATS[name].bytes)
    blocks = any_blocks(name, 37, 768)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf_type(name)))
    assert torch.equal(quantized.dequantize(blocks, name), expected)


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if not f.nested])
def test_quantize_is_ggufs(name):
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 320, generator=make) * torch.logspace(-6, 3, 50).unsqueeze(1)
    weight[3] = 0
    weight[4, :32] = weight[4, 0]
    weight[5] = torch.randint(-9, 10, (320,), generator=make) / 2  # ties
    expected = gguf.quants.quantize(weight.numpy(), gguf_type(name))
    assert torch.equal(quantized.quantize(weight, name), torch.from_numpy(expected))


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_rounds_to_the_nearest(name):
    make = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 512, generator=make)
    weight[2] = 0
    weight[3] = weight[3].abs()
    error = quantized.dequantize(quantized.quantize(weight, name), name) - weight
    limit = {4: 0.12, 5: 0.06, 6: 0.03, 8: 0.008}[FORMATS[name].bits]
    assert (error.norm(dim=-1) <= limit * weight.norm(dim=-1)).all()
    assert torch.equal(quantized.quantize(weight.double(), name), quantized.quantize(weight, name))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [0, 1, 16, 33])
def test_packed_is_the_same_matrix(name, n):
    blocks = any_blocks(name, n, 512)
    packed = quantized.pack_quantized(blocks, name)
    assert packed.numel() == FORMATS[name].packed_bytes(n, 512)
    assert torch.equal(quantized.unpack_quantized(packed, name, n, 512), blocks)


def test_rounded_activations():
    x = torch.zeros(4, 64)
    x[0, 3], x[0, 40] = 254.0, -1e-31
    x[1, :32] = torch.linspace(-127, 127, 32)
    x[2, 5], x[2, 37], x[3, 0] = torch.inf, torch.nan, -5.0
    q, scale = quantized.quantize_activations(x)
    assert q[0, 0].tolist() == [0, 0, 0, 127] + [0] * 28
    assert scale[0, 0] == 2
    assert not q[0, 1].any()
    assert q[1, 0].tolist() == x[1, :32].round().tolist()
    assert scale[2].isnan().all()
    assert not q[2].any()
    assert q[3, 0, 0] == -127
