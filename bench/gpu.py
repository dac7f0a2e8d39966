"""Times the CUDA kernels on a GPU beside torch's own and prints a table; `--json FILE` keeps it.

    python bench/gpu.py [--only NAME] [--rounds 15] [--seconds 240] [--json FILE] [--small]

Every call gets its inputs from a ring of copies that together are larger than the L2 cache. A round times each
implementation by CUDA events over one turn of the ring, in an order that is reversed every time; the medians over
rounds are reported. Peers: torch's operator, the reference under torch.compile, and for attention the SDPA backends and
FlexAttention. `--small` runs every op's smaller samples once and times nothing, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

import llmcore
from bench.cases import AGREE, PEER_AGREE, Case
from llmcore.ops import OpSpec, Sample, registry, support

Call = Callable[[Sample], list[Tensor]]
SDPA = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for item in output for t in tensors(item)] if isinstance(output, (tuple, list)) else []


def map_tensors(value, f):
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, f) for v in value)
    return value


def fresh(sample: Sample, differentiable: bool) -> Sample:
    """The call on copies of its tensors, with their strides."""

    def copy(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    args = [map_tensors(a, copy) for a in sample.args]
    kwargs = {k: map_tensors(v, copy) for k, v in sample.kwargs.items()}
    for where in sample.differentiable if differentiable else ():
        (args if isinstance(where, int) else kwargs)[where].requires_grad_()
    return Sample(sample.label, tuple(args), kwargs, sample.differentiable)


def ring(sample: Sample, differentiable: bool) -> list[Sample]:
    """Copies that fill L2 twice over: none is still there when its turn comes again."""
    size = sum(t.nbytes for t in tensors([*sample.args, *sample.kwargs.values()]))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [fresh(sample, differentiable) for _ in range(max(2, min(64, 2 * l2 // max(size, 1) + 1)))]


def attention_peers() -> dict[str, Callable]:
    def sdpa(backend: SDPBackend) -> Callable:
        def run(q, k, v, *, causal=False, scale=None, **unsupported):
            if unsupported or (causal and q.shape[1] != k.shape[1]):  # its causal mask is aligned to the top left
                raise NotImplementedError
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
            return out.transpose(1, 2)

        return run

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def flex(q, k, v, *, causal=False, scale=None, **unsupported):
        if unsupported:
            raise NotImplementedError
        lengths = (q.shape[1], k.shape[1])
        if causal and lengths not in masks:
            offset = lengths[1] - lengths[0]
            masks[lengths] = create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, *lengths, device="cuda")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = masks[lengths] if causal else None
        return compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return {**{name: sdpa(backend) for name, backend in SDPA.items()}, "flex": flex}


def implementations(spec: OpSpec) -> dict[str, Callable]:
    found = {"llmcore": spec.op}
    if spec.name == "attention":
        found |= attention_peers()
    elif spec.peer:
        found["torch"] = spec.peer
    return found | {"compiled": torch.compile(spec.reference, dynamic=False)}


def forward(function: Callable) -> Call:
    def call(sample: Sample) -> list[Tensor]:
        with torch.no_grad():
            return tensors(function(*sample.args, **sample.kwargs))

    return call


def forward_backward(function: Callable) -> Call:
    seeds: dict[tuple, Tensor] = {}

    def seed(t: Tensor) -> Tensor:
        key = (t.shape, t.dtype)
        if key not in seeds:
            seeds[key] = torch.randn_like(t, memory_format=torch.contiguous_format)
        return seeds[key]

    def call(sample: Sample) -> list[Tensor]:
        leaves = [(sample.args if isinstance(w, int) else sample.kwargs)[w] for w in sample.differentiable]
        outputs = [t for t in tensors(function(*sample.args, **sample.kwargs)) if t.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [seed(o) for o in outputs])]

    return call


def agrees(name: str, got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> str:
    """Why the outputs of the forward pass are not the expected ones, or ""."""
    limit = (AGREE if name == "llmcore" else PEER_AGREE)[dtype]
    for i, (a, b) in enumerate(zip(got, want)):
        if a.is_floating_point():
            error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            if not error <= limit:
                return f"tensor {i} is off by {error:.1e}"
    return ""


def expected(spec: OpSpec, sample: Sample) -> list[Tensor]:
    try:
        return forward(spec.reference)(sample)
    except torch.OutOfMemoryError:  # the reference of attention holds all scores
        torch.cuda.empty_cache()
        return forward(attention_peers()["sdpa_flash"])(sample)


def microseconds(call: Call, samples: list[Sample]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for sample in samples:
        call(sample)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / len(samples)


def measure(spec: OpSpec, sample: Sample, dtype: torch.dtype, backward: bool, rounds: int) -> dict:
    samples = ring(sample, backward)
    want = expected(spec, sample)
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, function in implementations(spec).items():
        call = (forward_backward if backward else forward)(Case.timed(function))
        try:
            reason = agrees(name, forward(function)(sample), want, dtype)
            microseconds(call, samples)  # warms up, compiles
        except Exception as error:  # a peer that does not take this call
            if name == "llmcore":
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if reason and name == "llmcore":
            raise AssertionError(f"{spec.name}, {sample.label}: {reason}")
        if reason:
            left_out[name] = reason
        else:
            calls[name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 else list(reversed(calls)):
            times[name].append(microseconds(calls[name], samples))
    row = {
        "op": spec.name,
        "case": sample.label,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": "forward+backward" if backward else "forward",
        "us": {name: statistics.median(t) for name, t in times.items()},
        "left_out": left_out,
    }
    own = row["us"]["llmcore"] * 1e-6
    if spec.flops:
        row["tflops"] = spec.flops(sample) * ((3.5 if spec.name == "attention" else 3) if backward else 1) / own / 1e12
    elif spec.bytes and not backward:
        row["gbytes"] = spec.bytes(sample) / own / 1e9
    return row


def ceilings(rounds: int) -> dict[str, float]:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1 << 28, device="cuda")  # 1 GiB
    y = torch.empty_like(x)

    def median(function: Callable) -> float:
        once = Sample("", ())
        return statistics.median(microseconds(lambda _: function(), [once]) for _ in range(rounds)) * 1e-6

    median(lambda: a @ b)  # warm
    return {
        "mm_bfloat16_tflops": 2 * n**3 / median(lambda: a @ b) / 1e12,
        "copy_gbytes": 2 * x.nbytes / median(lambda: y.copy_(x)) / 1e9,
    }


def describe(row: dict, limits: dict[str, float]) -> str:
    own, rate = row["us"]["llmcore"], ""
    if "tflops" in row:
        rate = f"{row['tflops']:7.1f} TFLOP/s ({row['tflops'] / limits['mm_bfloat16_tflops']:.2f} of mm)"
    elif "gbytes" in row:
        rate = f"{row['gbytes']:7.0f} GB/s    ({row['gbytes'] / limits['copy_gbytes']:.2f} of copy)"
    ratios = "  ".join(f"{name} {us / own:5.2f}x" for name, us in row["us"].items() if name != "llmcore")
    name = f"{row['op']}: {row['case']}"[:48]
    return f"{name:48} {row['dtype']:9} {row['direction']:17} {own:9.1f} us  {rate:36} {ratios}"


def experts_benchmarks(spec: OpSpec, dtype: torch.dtype) -> Iterator[Sample]:
    """A layer of 128 experts, 8 for each token, in training and in decoding: of `grouped_glu` the first half, which
    gathers its rows, of `grouped_gemm` the second."""
    experts, top_k, dim, ffn = 128, 8, 2048, 768
    first = spec.name == "grouped_glu"
    n, k = (2 * ffn, dim) if first else (dim, ffn)
    weight = torch.randn(experts, n, k, device="cuda", dtype=dtype) * k**-0.5
    for label, tokens in (("32k tokens", 32768), ("about 1 row each", experts // top_k)):
        of_rows, order = torch.randint(experts, (tokens * top_k,), device="cuda").sort()
        offsets = torch.searchsorted(of_rows, torch.arange(experts + 1, device="cuda"), out_int32=True)
        gathered = {"token_of": (order // top_k).int(), "row_of": order.argsort().view(tokens, top_k).int()}
        x = torch.randn(tokens if first else tokens * top_k, k, device="cuda", dtype=dtype)
        yield Sample(f"128 experts, {label}", (x, weight, offsets), gathered if first else {}, (0, 1))


def benchmarks(spec: OpSpec, dtype: torch.dtype) -> Iterator[Sample]:
    """The registry's, and attention and experts at sizes that a GPU is bought for."""
    yield from spec.benchmarks(dtype, "cuda")
    if spec.name in ("grouped_gemm", "grouped_glu"):
        yield from experts_benchmarks(spec, dtype)
    if spec.name != "attention":
        return
    for batch, seq, heads, kv_heads, dim in ((4, 4096, 32, 8, 128), (1, 16384, 32, 8, 128), (8, 2048, 16, 16, 64)):
        q, k, v = (torch.randn(batch, seq, h, dim, device="cuda", dtype=dtype) for h in (heads, kv_heads, kv_heads))
        yield Sample(
            f"causal {batch}x{seq}x{heads}/{kv_heads}x{dim}", (q, k, v), {"causal": True}, differentiable=(0, 1, 2)
        )


def served() -> list[tuple[OpSpec, torch.dtype]]:
    return [(registry[name], getattr(torch, d)) for name, row in support().items() for d in row.get("cuda", ())]


def run_small_samples(only: str) -> None:
    for spec, dtype in served():
        for sample in spec.samples(dtype, "cuda") if only in spec.name else ():
            with llmcore.backend("kernel"), torch.no_grad():
                spec.op(*sample.args, **sample.kwargs)
            if sample.differentiable:
                forward_backward(spec.op)(fresh(sample, True))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=240, help="start no further case after this time")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--small", action="store_true", help="run the small samples once, time nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing to time")
        return
    if not served():
        print("no op of this version lists a CUDA kernel")
        return
    if options.small:
        return run_small_samples(options.only)
    began = time.monotonic()
    limits = ceilings(options.rounds)
    info = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(info, *(f"{k} {v:.1f}" for k, v in limits.items()), sep="  ", flush=True)
    rows = []
    for spec, dtype in served():
        if options.only not in spec.name or spec.benchmarks is None or dtype == torch.float16:
            continue  # float16 is as fast as bfloat16
        for sample in benchmarks(spec, dtype):
            for backward in (False, True) if sample.differentiable else (False,):
                if time.monotonic() - began > options.seconds:
                    print(f"out of time: {spec.name} and what follows were not measured")
                    return
                rows.append(measure(spec, sample, dtype, backward, options.rounds))
                print(describe(rows[-1], limits), flush=True)
                if options.json:  # after every row: a run that is cut short keeps what it measured
                    result = {"machine": info, "ceilings": limits, "results": rows}
                    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
