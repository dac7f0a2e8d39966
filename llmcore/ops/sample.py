"""Drawing tokens from logits, and the penalties on repetition that come before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, refuse_gradient, register, register_fake, use_kernel


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
    """Draws a token from each row of logits.

    The filters apply in this order, each to what the one before left, renormalised:

    1. Logits, -0 as 0, are divided by the temperature. Below 1e-30 the row is greedy: the largest logit wins, the lower
       id among equals, and nothing below applies.
    2. top_k keeps the k likeliest tokens; of equal logits the lower ids.
    3. top_p keeps the likeliest tokens, in the same order, up to the one with which their sum reaches top_p (nucleus
       sampling, arXiv 1904.09751). Probabilities are summed in units of 2^-40 of the likeliest one.
    4. min_p keeps tokens with at least min_p of the likeliest one's probability (arXiv 2407.01082).

    A token e^-86 times as likely as the likeliest one, or less, is never drawn.

    The draw is a race: token i's time is E_i / p_i, where the E_i are independent exponential variables, and the first
    one wins. E_i is a function of (seed, position, i) alone: Philox4x32-10 (Salmon et al., SC 2011) with the seed as
    key. So a row's token depends neither on the rows beside it nor on the device, and kernels and reference give the
    same tokens, bit for bit the same logprobs, on every machine.

    Args:
        logits: (rows, vocab), float32, bfloat16 or float16 (float64 through the reference, rounded to float32); vocab 1
            to 2^22; -inf marks a token that can't be drawn.
        temperature, top_k, top_p, min_p: one number, or one for each row, (rows,). Accepted: 0 or above; 0 (off) or
            above; above 0, to 1 (off); 0 (off) to 1.
        seeds: int64, one number or (rows,). Rows that share a seed and a position share the noise.
        positions: int64, one number or (rows,): which draw of the seed this is, such as the place that the token will
            have in its sequence.

    Returns:
        tokens (rows,) int64, and logprobs (rows,) float32: the drawn token's under log_softmax(logits), before
        temperature and filters.

    Raises:
        RuntimeError: a row that holds NaN or +inf or nothing but -inf, by number; a setting out of its range. On a CUDA
            device nobody waits to look: there such a row gives token -1 and logprob NaN, and settings in tensors are
            the caller's word.
    """
    settings = (
        _per_row("temperature", temperature, logits, torch.float32),
        _per_row("top_k", top_k, logits, torch.int64),
        _per_row("top_p", top_p, logits, torch.float32),
        _per_row("min_p", min_p, logits, torch.float32),
        _per_row("seeds", seeds, logits, torch.int64),
        _per_row("positions", positions, logits, torch.int64),
    )
    if not use_kernel("sample", logits):
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        return reference.sample(logits, **dict(zip(names, settings)))
    return torch.ops.llmcore.sample(logits, *settings)


def apply_penalties_(
    logits: Tensor,
    tokens: Tensor,
    prompt_lens: Tensor,
    *,
    repetition: float | Tensor = 1.0,
    presence: float | Tensor = 0.0,
    frequency: float | Tensor = 0.0,
) -> None:
    """Changes the logits of tokens that a row has seen, in place.

    A logit x whose token is in the row's prompt or output becomes x / repetition if x > 0, else x * repetition (CTRL,
    arXiv 1909.05858); then, where the token stands n >= 1 times in the output, x - n * frequency - presence. In
    float32, rounded once to the logits' dtype.

    Args:
        logits: (rows, vocab), float32, bfloat16 or float16 (float64 through the reference); mutated, so its rows may
            not overlap. Not differentiable.
        tokens: (rows, max_len) int32 or int64: each row's prompt and then its output; -1 is padding, anywhere.
        prompt_lens: (rows,) int32 or int64: how many of the first entries of its row are the prompt.
        repetition: above 0, one number or (rows,); 1 is off.
        presence, frequency: one number each or (rows,); 0 is off.

    Raises:
        RuntimeError: a token id or length out of its range, by place; a setting that is not finite. On a CUDA device
            ids outside the vocabulary are skipped, and the rest is the caller's word.
    """
    settings = (
        _per_row("repetition", repetition, logits, torch.float32),
        _per_row("presence", presence, logits, torch.float32),
        _per_row("frequency", frequency, logits, torch.float32),
    )
    if not use_kernel("apply_penalties_", logits):
        names = ("repetition", "presence", "frequency")
        return reference.apply_penalties_(logits, tokens, prompt_lens, **dict(zip(names, settings)))
    return torch.ops.llmcore.apply_penalties_(logits, tokens, prompt_lens, *settings)


def sampling_probabilities(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """The distribution that `sample` draws from: (rows, vocab) float64, each row summing to 1. In plain torch on every
    device; arguments and errors are those of `sample`."""
    return reference.sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


# What a plain number may be: it is looked at here, since on a CUDA device nobody looks at tensors.
_RANGES = {
    "temperature": (lambda x: 0 <= x < float("inf"), "0 (greedy) or above"),
    "top_k": (lambda x: x >= 0, "0 (off) or above"),
    "top_p": (lambda x: 0 < x <= 1, "above 0, to 1 (off)"),
    "min_p": (lambda x: 0 <= x <= 1, "0 (off) to 1"),
    "repetition": (lambda x: 0 < x < float("inf"), "above 0"),
}


def _per_row(name: str, value: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype) if dtype.is_floating_point else value
    if name in _RANGES and not _RANGES[name][0](value):
        raise RuntimeError(f"{name} is {value}; accepted: {_RANGES[name][1]}")
    return torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


@register_fake("sample")
def _(logits, temperature, top_k, top_p, min_p, seeds, positions):
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


@register_fake("apply_penalties_")
def _(logits, tokens, prompt_lens, repetition, presence, frequency):
    return None


refuse_gradient("sample")


def _on_copies(function):
    """The op on a copy of the logits (a sample is used more than once), returning them."""

    def run(logits, *args, **kwargs):
        copy = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
        copy.copy_(logits)
        function(copy, *args, **kwargs)
        return copy

    run.in_place = function
    return run


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 2.0) -> Tensor:
        return (torch.randn(*shape, generator=make) * scale).to(device, dtype)

    def draws(rows: int) -> dict[str, Tensor]:
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=make)
        return {"seeds": seeds.to(device), "positions": (torch.arange(rows) * 1_000_000_007).to(device)}

    def uniform(rows: int, low: float, high: float) -> Tensor:
        return (torch.rand(rows, generator=make) * (high - low) + low).to(device)

    def mixed(rows: int, vocab: int) -> dict[str, Tensor]:
        """Each setting off in a part of the rows; some rows greedy."""
        off = torch.rand(4, rows, generator=make).to(device) < 0.3
        top_k = torch.randint(1, vocab + 2, (rows,), generator=make).to(device)
        return {
            "temperature": uniform(rows, 0.05, 2.5).masked_fill(off[0], 0),
            "top_k": top_k.masked_fill(off[1], 0),
            "top_p": uniform(rows, 0.01, 1).masked_fill(off[2], 1),
            "min_p": uniform(rows, 0, 0.3).masked_fill(off[3], 0),
            **draws(rows),
        }

    for rows, vocab in ((12, 1), (9, 2), (20, 5), (20, 64), (12, 257), (6, 1000), (3, 3333)):
        yield Sample(f"{(rows, vocab)}", (randn(rows, vocab),), mixed(rows, vocab))
    yield Sample("one number each", (randn(5, 100),), {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05})
    yield Sample("greedy, ties", (randn(7, 40).round(),), {"temperature": 0.0})
    ties = randn(6, 600, scale=1.0).round()
    yield Sample("top-k cuts ties", (ties,), {"top_k": 37, **draws(6)})
    yield Sample("top-p cuts ties", (ties,), {"top_p": 0.61, **draws(6)})
    yield Sample("top-k and top-p cut ties", (torch.zeros_like(ties),), {"top_k": 150, "top_p": 0.5, **draws(6)})
    below_0 = {"temperature": 0.01, "top_p": 0.5, **draws(6)}
    yield Sample("top-p cuts ties below 0", (torch.full_like(ties, -3),), below_0)
    yield Sample("all at their extremes", (randn(8, 130),), {"top_k": 1, "top_p": 1e-9, "min_p": 1.0, **draws(8)})
    yield Sample("tiny temperature", (randn(4, 90),), {"temperature": 1e-9, **draws(4)})
    yield Sample("huge temperature", (randn(4, 90),), {"temperature": 1e30, "top_p": 0.5, **draws(4)})
    masked = randn(8, 200)
    masked[:, 3:] = float("-inf")
    masked[4:, 190] = -1.0
    yield Sample("masked tokens", (masked,), {"top_k": 50, "top_p": 0.99, **draws(8)})
    yield Sample("large logits", (randn(6, 300, scale=3000.0),), mixed(6, 300))
    yield Sample("zeros of both signs", (torch.tensor([[-0.0, 0.0, -0.0]] * 9).to(device, dtype),), draws(9))
    tied = {"seeds": torch.tensor([128550796, 148660678, 146303352, 24962018], device=device)}
    race = torch.zeros(4, 8, device=device, dtype=dtype)
    yield Sample("two tokens win the race", (race,), tied)  # found by search: 0 and 1, 1 and 7, 3 and 6, 4 and 5
    yield Sample("strided rows", (randn(12, 200)[::2, 7:160],), mixed(6, 153))
    yield Sample("transposed", (randn(70, 6).t(),), mixed(6, 70))
    yield Sample("no rows", (randn(0, 30),), draws(0))


def _penalty_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def call(label: str, rows: int, vocab: int, max_len: int, index_dtype=torch.int64, **changed) -> Sample:
        logits = (torch.randn(rows, vocab, generator=make) * 3).to(device, dtype)
        tokens = torch.randint(-1, vocab, (rows, max_len), generator=make)
        prompt_lens = torch.randint(0, max_len + 1, (rows,), generator=make)
        settings = {
            "repetition": torch.rand(rows, generator=make) + 0.6,
            "presence": torch.randn(rows, generator=make),
            "frequency": torch.randn(rows, generator=make),
        }
        settings = {k: v.to(device) for k, v in settings.items()} | changed
        return Sample(
            label, (logits, tokens.to(device, index_dtype), prompt_lens.to(device, index_dtype)), settings
        )  # fmt: skip

    for rows, vocab, max_len in ((1, 1, 3), (5, 40, 17), (9, 300, 700), (3, 17000, 90)):
        yield call(f"{(rows, vocab, max_len)}", rows, vocab, max_len)
    yield call("int32 ids", 6, 50, 30, torch.int32)
    yield call("nothing seen", 3, 20, 0)
    yield call("one number each", 4, 25, 30, repetition=1.2, presence=0.5, frequency=0.25)
    yield call("off", 4, 25, 30, repetition=1.0, presence=0.0, frequency=0.0)
    yield call("no rows", 0, 25, 30)
    strided = call("strided rows", 4, 160, 50)
    yield Sample(strided.label, (strided.args[0][:, 7:107], strided.args[1] % 100, strided.args[2]), strided.kwargs)


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = 8
    logits = (torch.randn(rows, 131072, generator=torch.Generator().manual_seed(0)) * 2).to(device, dtype)
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    settings = {k: torch.full((rows,), v, device=device) for k, v in settings.items()}
    settings["top_k"] = settings["top_k"].long()
    draws = {"seeds": torch.arange(rows, device=device), "positions": torch.full((rows,), 7, device=device)}
    yield Sample(f"{rows} rows, V 128k, top-k + top-p", (logits,), settings | draws)
    yield Sample(f"{rows} rows, V 128k, no filter", (logits,), draws)


def _penalty_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    rows = 8
    logits = torch.randn(rows, 131072, generator=make).to(device, dtype)
    tokens = torch.randint(0, 131072, (rows, 2048), generator=make).to(device)
    lens, one = torch.full((rows,), 1024, device=device), torch.ones(rows, device=device)
    settings = {"repetition": one * 1.1, "presence": one * 0.5, "frequency": one * 0.25}
    yield Sample(f"{rows} rows, V 128k, 2048 tokens", (logits, tokens, lens), settings)


def _peer(logits: Tensor, *, temperature=1.0, top_k=None, top_p=None, min_p=None, seeds=None, positions=None) -> Tensor:
    """By sorting, as engines without kernels of their own do: per-row settings as tensors, none greedy. Its draws are
    from the same distribution, with noise of torch's own."""
    x = logits.float() / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    if top_k is None:
        return (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1)
    ranked, ids = x.sort(dim=-1, descending=True, stable=True)  # of equal logits the lower ids go first, as in `sample`
    rank = torch.arange(x.shape[1], device=x.device)
    ranked = ranked.masked_fill(rank >= top_k[:, None], -torch.inf)
    p = ranked.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p[:, None], 0)
    p = p.masked_fill(p < min_p[:, None] * p[:, :1], 0)
    return ids.gather(1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)).squeeze(1)


def _check_draws(sample: Sample, outputs: list[Tensor]) -> str:
    """What is wrong with the peer's tokens, whose noise is not ours: each must be one that the filters keep."""
    settings = {name: value for name, value in sample.kwargs.items() if name not in ("seeds", "positions")}
    p = sampling_probabilities(*sample.args, **settings).gather(1, outputs[0][:, None])
    return "" if (p > 0).all() else f"{int((p == 0).sum())} tokens have probability 0"


_peer.check = _check_draws


def _penalty_peer(logits, tokens, prompt_lens, *, repetition, presence, frequency) -> None:
    """By counting into tensors of the logits' shape; no padding."""
    rows, vocab = logits.shape
    output = torch.arange(tokens.shape[1], device=tokens.device) >= prompt_lens[:, None]
    count = torch.zeros(rows, vocab, device=logits.device).scatter_add_(1, tokens, output.float())
    seen = torch.zeros(rows, vocab, dtype=torch.bool, device=logits.device).scatter_(1, tokens, True)
    x, factor = logits.float(), repetition[:, None]
    x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
    logits.copy_(x - frequency[:, None] * count - presence[:, None] * (count > 0))


register(
    OpSpec(
        name="sample",
        op=sample,
        reference=reference.sample,
        torch_ops=("sample",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("greedy", "temperature", "top-k", "top-p", "min-p", "settings and seeds per row", "logprobs"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: s.args[0].numel() * s.args[0].element_size(),
    )
)
register(
    OpSpec(
        name="apply_penalties_",
        op=_on_copies(apply_penalties_),
        reference=_on_copies(reference.apply_penalties_),
        torch_ops=("apply_penalties_",),
        samples=_penalty_samples,
        dtypes=CPU_AND_CUDA,
        features=("repetition", "presence", "frequency", "settings per row", "padding tokens"),
        benchmarks=_penalty_benchmarks,
        peer=_on_copies(_penalty_peer),
        bytes=lambda s: s.args[1].numel() * (s.args[1].element_size() + 2 * s.args[0].element_size()),
    )
)
