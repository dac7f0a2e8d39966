"""Weights in GGUF's block formats: what their bytes mean, how the kernels lay them out, and products with them.

A matrix (n, k) of format F is a uint8 tensor (n, k / F.block * F.bytes): each row is a chain of blocks. A weight is

    w = d * q - offset * d        q4_0, q5_0, q8_0            one float16 d for 32 weights
    w = d * q + m                 q4_1, q5_1                  a float16 m beside it
    w = d * sc * q - m * mn       q4_k, q5_k                  d, m for 256 weights; 6 bits of sc and mn for 32
    w = d * sc * (q - offset)     q6_k                        d for 256 weights; 8 bits of sc for 16

with unsigned q of 4, 5, 6 or 8 bits. `Fields` holds these numbers without the formats' ways of interleaving them; the
blocks of a file and the layout of the kernels ("packed") are both read into it and written from it.

Packed: panels of 16 rows, the last one padded with zeros. A panel of a matrix is

    the scales, 16 rows of each kind together
        q4_0 ... q8_0: for each 32 weights d and, where the format has it, m
        q4_k, q5_k:    for each 256 weights d and m, then 8 times sc and mn
        q6_k:          for each 256 weights d, then 8 times the two sc of 32 weights
    up to a multiple of 64 bytes; then
    for each 32 weights along k: lines of 64 bytes, each 16 rows x 4 adjacent weights. With the weights' 8 groups of 4:
        8 bits: 8 lines, q of group g
        else:   4 lines, the low 4 bits of q, of group g in the low and of group g + 4 in the high half of each byte
        5 bits: 1 line, bit g of a byte is the highest bit of q in group g
        6 bits: 2 lines, bits 2 (g % 4) and the next of a byte in line g / 4 are the two highest bits of q in group g
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcore.reference.checks import check_indices, check_offsets, check_shape

PANEL = 16  # rows
LINE = 64  # bytes


@dataclass(frozen=True)
class Format:
    """One of GGUF's block formats.

    Attributes:
        block, bytes: a block holds `block` weights in `bytes` bytes.
        bits: of q.
        offset: what is subtracted from q; 0 where the format has minima instead.
        group: weights that share a scale.
        chunk: q's low 4 bits lie in chunks of this many bytes, the first half of a chunk's weights in the low halves.
    """

    name: str
    block: int
    bytes: int
    bits: int
    offset: int
    group: int = 32
    chunk: int = 16

    @property
    def nested(self) -> bool:
        """Whether the scales of groups are themselves quantised."""
        return self.block == 256

    @property
    def has_min(self) -> bool:
        return self.offset == 0

    def packed_scale_bytes(self, k: int) -> int:
        scales = k // self.block * (32 * (1 + self.has_min) + 256 * self.nested)
        return -(-scales // LINE) * LINE

    def packed_panel_bytes(self, k: int) -> int:
        return self.packed_scale_bytes(k) + k // 32 * LINE * self.bits

    def packed_bytes(self, n: int, k: int) -> int:
        return -(-n // PANEL) * self.packed_panel_bytes(k)


FORMATS = {
    f.name: f
    for f in (
        Format("q4_0", 32, 18, 4, 8),
        Format("q4_1", 32, 20, 4, 0),
        Format("q5_0", 32, 22, 5, 16),
        Format("q5_1", 32, 24, 5, 0),
        Format("q8_0", 32, 34, 8, 128),
        Format("q4_k", 256, 144, 4, 0, chunk=32),
        Format("q5_k", 256, 176, 5, 0, chunk=32),
        Format("q6_k", 256, 210, 6, 32, group=16, chunk=64),
    )
}


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"quantised format {name!r}; accepted: {', '.join(FORMATS)}")
    return FORMATS[name]


def check_k(format: Format, k: int) -> None:
    if k % format.block:
        raise ValueError(f"{format.name}: rows have {k} weights; accepted: multiples of {format.block}")


@dataclass
class Fields:
    """The numbers of a matrix (n, k): q (n, k) uint8; d and m (n, k / block) float16; of nested formats sc (n, k /
    group), int8 for q6_k and else uint8, and mn, shaped alike. m and mn are None where the format has no minima."""

    q: Tensor
    d: Tensor
    m: Tensor | None = None
    sc: Tensor | None = None
    mn: Tensor | None = None

    def scales(self, format: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, addend) of w = scale * q + addend, each (n, k / group)."""
        repeats = format.block // format.group
        scale, addend = self.d.to(dtype), None if self.m is None else self.m.to(dtype)
        if format.nested:
            scale = scale.repeat_interleave(repeats, -1) * self.sc.to(dtype)
            if addend is not None:
                addend = -(addend.repeat_interleave(repeats, -1) * self.mn.to(dtype))
        return scale, scale * -format.offset if addend is None else addend

    def weights(self, format: Format, dtype: torch.dtype) -> Tensor:
        scale, addend = self.scales(format, dtype)
        q = self.q.unflatten(-1, (-1, format.group)).to(dtype)
        if format.offset:  # d * (q - offset) is exact in float32
            return ((q - format.offset) * scale.unsqueeze(-1)).flatten(-2)
        return (q * scale.unsqueeze(-1) + addend.unsqueeze(-1)).flatten(-2)


# ---- a file's blocks ------------------------------------------------------------------------------------------------


def _view(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of x, dense; `contiguous` would leave an empty tensor's strides as they are."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _halves(raw: Tensor) -> Tensor:
    """(..., 2) bytes -> (...) float16"""
    return _view(raw, torch.float16).squeeze(-1)


def _bits(raw: Tensor, step: int, dim: int) -> Tensor:
    """A new dimension `dim` of a byte's parts of `step` bits, lowest first."""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=raw.device)
    parts = raw.unsqueeze(dim) >> shifts.view(-1, *[1] * (-1 - dim))
    return parts & ((1 << step) - 1)


def _joined(parts: Tensor, step: int, dim: int) -> Tensor:
    """The inverse of `_bits`."""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=parts.device)
    return (parts << shifts.view(-1, *[1] * (-1 - dim))).sum(dim, dtype=torch.uint8)


def _low_bits(raw: Tensor, chunk: int) -> Tensor:
    """(..., block / 2) bytes -> (..., block) of 4 bits"""
    return _bits(raw.unflatten(-1, (-1, chunk)), 4, -2).flatten(-3)


def _low_bytes(q: Tensor, chunk: int) -> Tensor:
    return _joined((q & 15).unflatten(-1, (-1, 2, chunk)), 4, -2).flatten(-2)


def _scales_of_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 sc and 8 mn of 6 bits: the first 4 of each in the low bits of bytes 0 ... 7, whose two highest bits
    are those of the last 4, whose low halves are in bytes 8 ... 11."""
    low, mid, high = raw.split(4, -1)
    sc = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], -1)
    mn = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 48)], -1)
    return sc, mn


def _bytes_of_k(sc: Tensor, mn: Tensor) -> Tensor:
    (sc, sc2), (mn, mn2) = sc.split(4, -1), mn.split(4, -1)
    return torch.cat([sc | (sc2 >> 4 << 6), mn | (mn2 >> 4 << 6), (sc2 & 15) | (mn2 << 4)], -1)


def _high_bits(format: Format, raw: Tensor) -> Tensor:
    if format.bits == 6:
        return _bits(raw.unflatten(-1, (2, 32)), 2, -2).flatten(-3)
    if format.nested:
        return _bits(raw, 1, -2).flatten(-2)
    return _bits(raw, 1, -1).flatten(-2)


def _high_bytes(format: Format, q: Tensor) -> Tensor:
    high = q >> 4
    if format.bits == 6:
        return _joined(high.unflatten(-1, (2, 4, 32)), 2, -2).flatten(-2)
    if format.nested:
        return _joined(high.unflatten(-1, (8, 32)), 1, -2)
    return _joined(high.unflatten(-1, (4, 8)), 1, -1)


def _parts(format: Format) -> dict[str, int]:
    """The parts of a block in their order -> their bytes."""
    if format.name == "q6_k":
        return {"low": 128, "high": 64, "sc": 16, "d": 2}
    parts = {"d": 2}
    if format.has_min:
        parts["m"] = 2
    if format.nested:
        parts["sc"] = 12
    if format.bits == 5:
        parts["high"] = format.block // 8
    return parts | ({"q": 32} if format.bits == 8 else {"low": format.block // 2})


def fields_of_blocks(blocks: Tensor, format: Format) -> Fields:
    """blocks: (n, bytes of a row) uint8, as in a file."""
    sizes = _parts(format)
    parts = dict(zip(sizes, blocks.unflatten(-1, (-1, format.bytes)).split(list(sizes.values()), -1)))
    fields = Fields(q=None, d=_halves(parts["d"]))
    if format.bits == 8:
        fields.q = (parts["q"] ^ 128).flatten(-2)
    else:
        q = _low_bits(parts["low"], format.chunk)
        if "high" in parts:
            q = q | (_high_bits(format, parts["high"]) << 4)
        fields.q = q.flatten(-2)
    if format.has_min:
        fields.m = _halves(parts["m"])
    if format.name == "q6_k":
        fields.sc = _view(parts["sc"], torch.int8).flatten(-2)
    elif format.nested:
        fields.sc, fields.mn = (part.flatten(-2) for part in _scales_of_k(parts["sc"]))
    return fields


def blocks_of_fields(fields: Fields, format: Format) -> Tensor:
    """The inverse of `fields_of_blocks`."""
    q = fields.q.unflatten(-1, (-1, format.block))
    parts = {"d": _view(fields.d.unsqueeze(-1), torch.uint8)}
    if format.has_min:
        parts["m"] = _view(fields.m.unsqueeze(-1), torch.uint8)
    if format.bits == 8:
        parts["q"] = q ^ 128
    else:
        parts["low"] = _low_bytes(q, format.chunk)
        if format.bits > 4:
            parts["high"] = _high_bytes(format, q)
    if format.name == "q6_k":
        parts["sc"] = _view(fields.sc, torch.uint8).unflatten(-1, (-1, 16))
    elif format.nested:
        parts["sc"] = _bytes_of_k(fields.sc.unflatten(-1, (-1, 8)), fields.mn.unflatten(-1, (-1, 8)))
    return torch.cat([parts[name] for name in _parts(format)], -1).flatten(-2)


# ---- the kernels' layout --------------------------------------------------------------------------------------------


def _by_panel(x: Tensor, block: int) -> Tensor:
    """(n, columns) -> (panels, columns / block, block, 16), rows padded with zeros."""
    padding = -len(x) % PANEL
    if padding:
        x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
    return x.view(len(x) // PANEL, PANEL, x.shape[1] // block, block).permute(0, 2, 3, 1)


def _by_row(x: Tensor, n: int) -> Tensor:
    """The inverse of `_by_panel`."""
    return x.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)[:n].contiguous()


def pack_quantized(blocks: Tensor, format: str) -> Tensor:
    """See `llmcore.ops.pack_quantized`."""
    f = format_named(format)
    _, k = _shape_of(blocks, f)
    fields = fields_of_blocks(blocks, f)
    # (panels, blocks of 32, group, row, weight)
    q = _by_panel(fields.q, 32).unflatten(2, (8, 4)).transpose(-1, -2)
    if f.bits == 8:
        lines = [q]
    else:
        lines = [_joined((q & 15).unflatten(2, (2, 4)).transpose(2, 3), 4, -3)]
        if f.bits == 5:
            lines.append(_joined((q >> 4).unflatten(2, (1, 8)), 1, -3))
        if f.bits == 6:
            lines.append(_joined((q >> 4).unflatten(2, (2, 4)), 2, -3))
    quants = torch.cat([line.flatten(-2) for line in lines], 2).flatten(1)
    scales = [_by_panel(fields.d, 1)]
    if f.has_min:
        scales.append(_by_panel(fields.m, 1))
    scales = [_view(s, torch.uint8).flatten(2) for s in scales]
    if f.nested:
        groups = [_by_panel(fields.sc.view(torch.uint8), 256 // f.group).unflatten(2, (8, -1))]
        if f.has_min:
            groups.append(_by_panel(fields.mn, 8).unflatten(2, (8, 1)))
        scales.append(torch.cat(groups, -2).flatten(2))
    scales = torch.cat(scales, -1).flatten(1)
    padding = scales.new_zeros(len(scales), f.packed_scale_bytes(k) - scales.shape[1])
    return torch.cat([scales, padding, quants], 1).flatten()


def _shape_of(blocks: Tensor, format: Format) -> tuple[int, int]:
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % format.bytes:
        raise ValueError(
            f"blocks have shape {tuple(blocks.shape)} and dtype {blocks.dtype}; expected (n, bytes) uint8, "
            f"{format.bytes} bytes for {format.block} weights of {format.name}"
        )
    return len(blocks), blocks.shape[1] // format.bytes * format.block


def fields_of_packed(packed: Tensor, format: Format, n: int, k: int) -> Fields:
    """packed: whole panels, of which the first n rows are taken."""
    panels = packed.view(-(-n // PANEL), format.packed_panel_bytes(k))
    lines = panels[:, format.packed_scale_bytes(k) :].unflatten(1, (k // 32, format.bits, PANEL, 4))
    if format.bits == 8:
        q = lines
    else:
        q = _bits(lines[:, :, :4], 4, -3).transpose(2, 3).flatten(2, 3)
        if format.bits == 5:
            q = q | (_bits(lines[:, :, 4:], 1, -3).flatten(2, 3) << 4)
        if format.bits == 6:
            q = q | (_bits(lines[:, :, 4:], 2, -3).flatten(2, 3) << 4)
    fields = Fields(q=_by_row(q.transpose(-1, -2).flatten(2, 3), n), d=None)
    blocks = k // format.block
    halves = 32 * (1 + format.has_min)
    step = halves + 256 * format.nested
    scales = panels[:, : blocks * step].unflatten(1, (blocks, step))
    d = _view(scales[..., :halves], torch.float16).unflatten(-1, (-1, PANEL))
    fields.d = _by_row(d[:, :, :1], n)
    if format.has_min:
        fields.m = _by_row(d[:, :, 1:], n)
    if format.nested:
        groups = scales[..., halves:].unflatten(-1, (8, 2, PANEL))
        if format.has_min:
            fields.sc, fields.mn = (_by_row(groups[..., i, :], n) for i in range(2))
        else:
            fields.sc = _by_row(groups.flatten(2, 3), n).view(torch.int8)
    return fields


def unpack_quantized(packed: Tensor, format: str, n: int, k: int) -> Tensor:
    """The inverse of `pack_quantized`: blocks as in a file, (n, bytes of a row)."""
    f = format_named(format)
    _check_packed(packed, f, n, k)
    return blocks_of_fields(fields_of_packed(packed, f, n, k), f)


def _check_packed(packed: Tensor, format: Format, n: int, k: int) -> None:
    check_k(format, k)
    if packed.dtype != torch.uint8 or packed.shape != (format.packed_bytes(n, k),):
        raise ValueError(
            f"packed has shape {tuple(packed.shape)} and dtype {packed.dtype}; expected ({format.packed_bytes(n, k)},) "
            f"uint8, {format.name} of ({n}, {k})"
        )


# ---- numbers to blocks and back -------------------------------------------------------------------------------------


def dequantize(blocks: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """blocks (n, bytes of a row) uint8 -> weights (n, k). In float32 bit for bit what the `gguf` package gives."""
    f = format_named(format)
    _shape_of(blocks, f)
    return fields_of_blocks(blocks, f).weights(f, dtype)


def quantize(weight: Tensor, format: str) -> Tensor:
    """weight (n, k) of any floating dtype -> blocks (n, bytes of a row) uint8.

    Each weight is rounded to the nearest that its group's scale allows; scales are chosen by the group's extremes
    alone. For q4_0 ... q8_0 that is what llama.cpp does, bit for bit; for the nested formats it searches for better
    scales.

    Raises:
        ValueError: when k is no multiple of the format's block.
    """
    f = format_named(format)
    check_k(f, weight.shape[-1])
    chunks = [blocks_of_fields(_quantized(rows.float(), f), f) for rows in weight.detach().split(4096)]
    return torch.cat(chunks) if chunks else weight.new_zeros((0, weight.shape[1] // f.block * f.bytes)).byte()


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _extreme(x: Tensor) -> Tensor:
    """The number of largest magnitude, with its sign, of the last dimension, which is kept."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _quantized(weight: Tensor, format: Format) -> Fields:
    x = weight.unflatten(-1, (-1, format.group))
    if format.nested:
        return _quantized_min_k(x, format) if format.has_min else _quantized_q6_k(x)
    top = (1 << format.bits) - 1
    if format.bits == 8:
        d = x.abs().amax(-1, keepdim=True) / 127
        scaled = x * _inverse(d)
        magnitude = scaled.abs().floor()  # halves away from zero
        q = scaled.sign() * (magnitude + (2 * (scaled.abs() - magnitude)).floor()) + 128
    elif format.offset:
        d = _extreme(x) / -format.offset
        q = (x * _inverse(d) + (format.offset + 0.5)).trunc()
    else:
        low = x.amin(-1, keepdim=True)
        d = (x.amax(-1, keepdim=True) - low) / top
        q = ((x - low) * _inverse(d) + 0.5).trunc()
    fields = Fields(q.clamp(0, 255 if format.bits == 8 else top).to(torch.uint8).flatten(-2), d.half().squeeze(-1))
    if format.has_min:
        fields.m = low.half().squeeze(-1)
    return fields


def _quantized_min_k(x: Tensor, format: Format) -> Fields:
    """x: (n, groups, 32)"""
    top = (1 << format.bits) - 1
    low = x.amin(-1).clamp(max=0)
    scale, minimum = (x.amax(-1) - low).clamp(min=0) / top, -low

    def nested(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(of 256 weights, of 32, their product)"""
        values = values.unflatten(-1, (-1, 8))
        d = (values.amax(-1, keepdim=True) / 63).half()
        six = (values * _inverse(d.float())).round().clamp(0, 63)
        return d.squeeze(-1), six.to(torch.uint8).flatten(-2), (d.float() * six).flatten(-2)

    d, sc, scale = nested(scale)
    m, mn, minimum = nested(minimum)
    q = ((x + minimum.unsqueeze(-1)) * _inverse(scale.unsqueeze(-1))).round().clamp(0, top)
    return Fields(q.to(torch.uint8).flatten(-2), d, m, sc, mn)


def _quantized_q6_k(x: Tensor) -> Fields:
    """x: (n, groups, 16)"""
    scale = (_extreme(x).squeeze(-1) / -32).unflatten(-1, (-1, 16))
    d = (_extreme(scale) / -128).half()
    sc = (scale * _inverse(d.float())).round().clamp(-128, 127)
    scale = (d.float() * sc).flatten(-2).unsqueeze(-1)
    q = (x * _inverse(scale)).round().clamp(-32, 31) + 32
    return Fields(q.to(torch.uint8).flatten(-2), d.squeeze(-1), sc=sc.to(torch.int8).flatten(-2))


# ---- products -------------------------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """As for the kernels, no gradient: rounding has none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        q, scale = quantize_activations(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (q.to(wide) * scale.to(wide).unsqueeze(-1)).flatten(-2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise NotImplementedError("quantized_linear has no gradient")


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., k) -> (q (..., k / 32, 32) int8, scale (..., k / 32) float32), x = q * scale: by blocks of 32, in
    float32. A block whose magnitudes are below 2^-100 becomes zeros; one that is not finite has NaN for its scale."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1)
    finite = largest.isfinite()
    scale = torch.where(finite, largest / 127, torch.nan)
    top = torch.full_like(largest, 127)  # `127 / largest` would be two roundings: torch multiplies by 1 / largest
    inverse = torch.where(finite & (largest >= 2.0**-100), top / largest, 0)
    q = torch.where(finite.unsqueeze(-1), (blocks * inverse.unsqueeze(-1)).round(), 0)
    return q.to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """What the int8 activations made of x stand for, in float32 (float64 for such an x)."""
    return _Rounded.apply(x)


def quantized_linear(x: Tensor, packed: Tensor, format: str, out_features: int, bias: Tensor | None = None) -> Tensor:
    """See `llmcore.ops.quantized_linear`."""
    f = format_named(format)
    n, k = out_features, x.shape[-1]
    _check_packed(packed, f, n, k)
    if bias is not None:
        check_shape("quantized_linear: bias", bias, n)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = fields_of_packed(packed, f, n, k).weights(f, wide)
    y = torch.nn.functional.linear(rounded(x), weight, None if bias is None else bias.to(wide))
    return y.to(x.dtype)


def quantized_linear_(y: Tensor, x: Tensor, packed: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    """See `llmcore.ops.quantized_linear_`."""
    if y.dtype != x.dtype:
        raise TypeError(f"quantized_linear_: y has dtype {y.dtype}, but x has {x.dtype}")
    return y.copy_(quantized_linear(x, packed, format, y.shape[-1], bias))


def quantized_grouped_linear(
    x: Tensor,
    packed: Tensor,
    format: str,
    out_features: int,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `llmcore.ops.quantized_grouped_linear`."""
    name, num_experts = "quantized_grouped_linear", len(packed)
    if bias is not None:
        check_shape(f"{name}: bias", bias, num_experts, out_features)
    if token_of is not None:
        check_indices(f"{name}: token_of", token_of, 0, len(x))
        x = x[token_of.long()]
    bounds = check_offsets(f"{name}: offsets", offsets, num_experts, len(x))
    products = [
        quantized_linear(x[begin:end], expert, format, out_features, None if bias is None else bias[e])
        for e, (expert, begin, end) in enumerate(zip(packed, bounds[:-1], bounds[1:]))
    ]
    return torch.cat(products)


def quantized_embedding(
    ids: Tensor, packed: Tensor, format: str, num_embeddings: int, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `llmcore.ops.quantized_embedding`."""
    f = format_named(format)
    _check_packed(packed, f, num_embeddings, dim)
    flat = ids.flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_embeddings:
        raise IndexError(f"ids are {int(flat.min())} to {int(flat.max())}; accepted: 0 to {num_embeddings - 1}")
    panels, which = torch.unique(flat // PANEL, return_inverse=True)
    table = packed.view(-1, f.packed_panel_bytes(dim))[panels].flatten()
    fields = fields_of_packed(table, f, len(panels) * PANEL, dim)
    rows = fields.weights(f, torch.float32)[which * PANEL + flat % PANEL]
    return rows.to(dtype).view(*ids.shape, dim)
