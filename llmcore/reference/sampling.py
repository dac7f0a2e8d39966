"""Drawing tokens from logits.

The kernels give the same tokens for the same seeds on every device, and so does this: it takes the same steps in the
same order, each exact or rounded once (csrc/include/llmcore/sampling_math.h), and sums in integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_shape

MAX_VOCAB = 1 << 22
GREEDY_TEMPERATURE = 1e-30  # below: greedy
_NO_ENTRY = (1 << 63) - 1


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: int | Tensor = 0,
    positions: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """See `llmcore.ops.sample`."""
    x = _finite_rows(logits)
    rows = x.shape[0]
    temperature, top_k, top_p, min_p = _settings(x, temperature, top_k, top_p, min_p)
    seeds, positions = (
        _per_row(x, name, v, torch.int64) for name, v in (("seeds", seeds), ("positions", positions))
    )  # fmt: skip
    if rows == 0:
        return seeds.new_empty(0), x.new_empty(0)
    best = x.amax(-1, keepdim=True)
    e, keep = _filtered(x, temperature, top_k, top_p, min_p)
    time = _exponential(_philox(seeds, positions, x.shape[1])) / e
    time = torch.where((temperature < GREEDY_TEMPERATURE)[:, None], 0.0, time)
    ids = torch.arange(x.shape[1], device=x.device)
    entry = torch.where(keep, time.view(torch.int32).long() << 32 | ids, _NO_ENTRY)  # the lower id wins a tie
    tokens = entry.amin(-1) & 0xFFFFFFFF
    total = _fixed_point(_exp_nonpositive(x - best)).sum(-1)
    drawn = x.gather(1, tokens[:, None])
    return tokens, (drawn - best).squeeze(1) - _log(total.float() * 2.0**-40)


def sampling_probabilities(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """The distribution that `llmcore.ops.sample` draws from: (rows, vocab) float64, each row summing to 1."""
    x = _finite_rows(logits)
    temperature, top_k, top_p, min_p = _settings(x, temperature, top_k, top_p, min_p)
    if x.shape[0] == 0:
        return x.double()
    _, keep = _filtered(x, temperature, top_k, top_p, min_p)
    greedy = temperature < GREEDY_TEMPERATURE
    keep[greedy] = torch.zeros_like(keep[greedy]).scatter_(1, x[greedy].argmax(-1, keepdim=True), True)
    scaled = (x.double() - x.double().amax(-1, keepdim=True)) / temperature.masked_fill(greedy, 1).double()[:, None]
    return scaled.masked_fill(~keep, -torch.inf).softmax(-1)


def apply_penalties_(
    logits: Tensor,
    tokens: Tensor,
    prompt_lens: Tensor,
    *,
    repetition: float | Tensor = 1.0,
    presence: float | Tensor = 0.0,
    frequency: float | Tensor = 0.0,
) -> None:
    """See `llmcore.ops.apply_penalties_`."""
    check(logits.dim() == 2, f"apply_penalties_: logits has shape {tuple(logits.shape)}; expected (rows, vocab)")
    rows, vocab = logits.shape
    check_shape("apply_penalties_: tokens", tokens, rows, *tokens.shape[1:2])
    check_shape("apply_penalties_: prompt_lens", prompt_lens, rows)
    settings = {"repetition": repetition, "presence": presence, "frequency": frequency}
    repetition, presence, frequency = (
        _per_row(logits, name, v, torch.float32, "apply_penalties_") for name, v in settings.items()
    )
    tokens, max_len = tokens.long(), tokens.shape[1]
    for name, value, wrong in (
        ("tokens", tokens, (tokens < -1) | (tokens >= vocab)),
        ("prompt_lens", prompt_lens, (prompt_lens < 0) | (prompt_lens > max_len)),
        ("repetition", repetition, ~((repetition > 0) & repetition.isfinite())),
        ("presence", presence, ~presence.isfinite()),
        ("frequency", frequency, ~frequency.isfinite()),
    ):
        check(not wrong.any(), f"apply_penalties_: {name} holds {value[wrong][:1].tolist()}")
    place = torch.arange(max_len, device=logits.device)
    output = (place >= prompt_lens[:, None]) & (tokens >= 0)
    count = torch.zeros(rows, vocab, dtype=torch.int64, device=logits.device)
    seen = count.scatter_add(1, tokens.clamp_min(0), (tokens >= 0).long()) > 0
    count.scatter_add_(1, tokens.clamp_min(0), output.long())
    exact = logits.dtype == torch.float64
    x, factor = logits if exact else logits.float(), repetition[:, None]
    x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
    minus, times = -frequency[:, None], count.to(x.dtype)
    penalised = (minus * times + x if exact else _fma(minus, times, x)) - presence[:, None]
    x = torch.where(count > 0, penalised, x)
    logits.copy_(torch.where(seen, x.to(logits.dtype), logits))


# ---- arguments


def _finite_rows(logits: Tensor) -> Tensor:
    """The logits in float32, -0 as 0."""
    check(logits.dim() == 2, f"sample: logits has shape {tuple(logits.shape)}; expected (rows, vocab)")
    vocab = logits.shape[1]
    check(1 <= vocab <= MAX_VOCAB, f"sample: the vocabulary has {vocab} tokens; accepted: 1 to {MAX_VOCAB}")
    x = logits.detach().float() + 0.0
    bad = ~x.amax(-1).isfinite()  # amax is NaN where one is
    if bad.any():
        row = bad.nonzero()[0].item()
        raise RuntimeError(
            f"sample: the logits of row {row} hold NaN or +inf, or are all -inf; accepted: finite logits, and -inf "
            "beside a finite one"
        )
    return x


def _per_row(like: Tensor, name: str, value: float | Tensor, dtype: torch.dtype, op: str = "sample") -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.full((like.shape[0],), value, dtype=dtype, device=like.device)
    check_shape(f"{op}: {name}", value, like.shape[0])
    return value.to(dtype)


def _settings(x: Tensor, temperature, top_k, top_p, min_p) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature = _per_row(x, "temperature", temperature, torch.float32)
    top_k = _per_row(x, "top_k", top_k, torch.int64)
    top_p, min_p = _per_row(x, "top_p", top_p, torch.float32), _per_row(x, "min_p", min_p, torch.float32)
    for name, value, good, accepted in (
        ("temperature", temperature, (temperature >= 0) & temperature.isfinite(), "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (off) or above"),
        ("top_p", top_p, (top_p > 0) & (top_p <= 1), "above 0, to 1 (off)"),
        ("min_p", min_p, (min_p >= 0) & (min_p <= 1), "0 (off) to 1"),
    ):
        check(bool(good.all()), f"sample: {name} holds {value[~good][:1].tolist()}; accepted: {accepted}")
    return temperature, top_k, top_p, min_p


# ---- filters


def _filtered(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """(e^((x - max) / temperature) float32, which tokens stay bool); of greedy rows, the tokens with the largest x."""
    vocab = x.shape[1]
    best = x.amax(-1, keepdim=True)
    greedy = (temperature < GREEDY_TEMPERATURE)[:, None]
    inverse = (1.0 / temperature)[:, None].masked_fill(greedy, 0)
    e = _exp_nonpositive((x - best) * inverse)
    order = x.sort(dim=-1, descending=True, stable=True).indices  # of equals the lower id first
    rank = torch.arange(vocab, device=x.device)
    top_k = torch.where((top_k >= 1) & (top_k < vocab), top_k, vocab)[:, None]
    mass = torch.where(rank < top_k, _fixed_point(e).gather(1, order), 0)
    before = mass.cumsum(-1) - mass
    share = mass.sum(-1).double() * top_p.double()
    needed = torch.where(top_p < 1, share.ceil().clamp_min(1).long(), _NO_ENTRY)[:, None]
    keep = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, (rank < top_k) & (before < needed))
    keep &= (e >= min_p[:, None]) & (e > 0)
    return e, torch.where(greedy, x == best, keep)


# ---- float32 arithmetic, the same bits on every device


def _fma(a: float | Tensor, b: Tensor, c: float | Tensor) -> Tensor:
    """a * b + c rounded once to float32. The product is exact in float64; the sum is rounded to odd there, so that the
    second rounding can't go wrong (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    product = b.double() * (a.double() if isinstance(a, Tensor) else a)
    c = c.double() if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=b.device)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # Knuth's two-sum
    bits = total.view(torch.int64)
    inexact_and_even = (error != 0) & error.isfinite() & (bits & 1 == 0)
    away_from_zero = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact_and_even, bits + away_from_zero, bits).view(torch.float64).float()


def _constant(x: float) -> float:
    """x as float32 holds it."""
    return torch.tensor(x, dtype=torch.float32).item()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = _fma(p, x, _constant(c))
    return p


_EXP2 = (
    1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
    6.931472028550421e-1, 1.0,
)  # fmt: skip
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip


def _exp_nonpositive(x: Tensor) -> Tensor:
    log2_e, rest, magic = _constant(1.44269502), _constant(1.92596303e-8), 12582912.0
    inside = x >= -86
    x = x.masked_fill(~inside, 0)
    shifted = _fma(log2_e, x, magic)
    n = shifted - magic
    f = _fma(rest, x, _fma(log2_e, x, -n))
    p = _polynomial(f, _EXP2).view(torch.int32) + (n.int() << 23)
    return p.view(torch.float32).masked_fill(~inside, 0)


def _log_of(t: Tensor, exponent: Tensor) -> Tensor:
    p = _polynomial(t, _LOG)
    square = t * t
    rest = _fma(p * t, square, square * -0.5)
    return _fma(0.693359375, exponent, t + _fma(_constant(-2.12194440e-4), exponent, rest))


def _log(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    mantissa, exponent = mantissa * 2, exponent - 1
    above = mantissa > _constant(1.41421354)
    mantissa = torch.where(above, mantissa * 0.5, mantissa)
    return _log_of(mantissa - 1, (exponent + above.int()).float())


def _fixed_point(e: Tensor) -> Tensor:
    return (e * 2.0**40).long()


# ---- noise


def _philox(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Philox4x32-10: (rows, vocab) random uint32 as int64. Key: the seed. Counter: token // 4, position (two words), 0;
    the token's number is word token % 4 of the four."""
    low = 0xFFFFFFFF

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """The high and the low word of a 64-bit product."""
        return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, (a * b) & low

    groups = torch.arange((vocab + 3) // 4, device=seeds.device)[None, :]
    seeds, positions = seeds[:, None], positions[:, None]
    words = (groups, positions & low, positions >> 32 & low, torch.zeros_like(groups))
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    key0, key1 = seeds & low, seeds >> 32 & low
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :vocab]


def _exponential(random: Tensor) -> Tensor:
    """-log(u) of u = (random | 1) / 2^32."""
    odd = random | 1
    mantissa, exponent = torch.frexp(odd.double())  # exact
    below = mantissa >= 0xB504F334 / 2.0**32  # sqrt(1/2)
    t = torch.where(below, mantissa - 1, 2 * mantissa - 1).float()
    return -_log_of(t, torch.where(below, exponent - 32, exponent - 33).float())
