"""Times the CUDA kernels on a GPU beside torch's own and prints a table; `--json FILE` keeps it.

    python bench/gpu.py [--only NAME] [--rounds 15] [--seconds 240] [--json FILE] [--small]

Every call gets its inputs from a ring of copies that together are larger than the L2 cache. A round times each
implementation by CUDA events over one turn of the ring, captured in a CUDA graph where it can be, in an order that is
reversed every time; the medians over rounds are reported, with how many times llmcore is faster and what it must reach
(on an H200). Peers: torch's operator, the reference under torch.compile, and for attention the SDPA backends and
FlexAttention. Besides the ops there are two rows of larger things: an optimizer step (`--only optimizer`) and a whole
MoE layer (`--only moe_layer`). `--small` runs every op's smaller samples once and times nothing, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

import llmcore
from bench import moe_layer, optimizer
from bench.cases import AGREE, PEER_AGREE, Case
from bench.gpu_cases import MUST, benchmarks
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


def fresh(sample: Sample, differentiable: bool) -> Sample:
    """The call on copies of its tensors."""
    copy = sample.to(tensors([*sample.args, *sample.kwargs.values()])[0].device)
    for where in sample.differentiable if differentiable else ():
        (copy.args if isinstance(where, int) else copy.kwargs)[where].requires_grad_()
    return copy


def ring(sample: Sample, differentiable: bool) -> list[Sample]:
    """Copies that fill L2 twice over: none is still there when its turn comes again."""
    size = sum(t.nbytes for t in tensors([*sample.args, *sample.kwargs.values()]))
    return [fresh(sample, differentiable) for _ in range(max(2, min(64, 2 * l2_bytes() // max(size, 1) + 1)))]


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


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
    if spec is moe_layer.SPEC:
        return found | moe_layer.peers()
    if spec.name == "attention":
        found |= attention_peers()
    elif spec.peer:
        found["torch"] = spec.peer
    if spec.name == "linear_cross_entropy":
        found["torch_compiled"] = torch.compile(spec.peer, dynamic=False)
    return found | {"compiled": torch.compile(spec.reference, dynamic=False)}


def forward(function: Callable) -> Call:
    def call(sample: Sample) -> list[Tensor]:
        with torch.no_grad():
            return tensors(function(*sample.args, **sample.kwargs))

    return call


def _record(function: Callable, sample: Sample, seeds: dict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A forward pass: outputs, leaves, and the gradients that reach the outputs, which are the same in every call."""

    def seed(t: Tensor) -> Tensor:
        key = (t.shape, t.dtype)
        if key not in seeds:
            make = torch.Generator(t.device).manual_seed(0)
            seeds[key] = torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=make)
        return seeds[key]

    leaves = [(sample.args if isinstance(w, int) else sample.kwargs)[w] for w in sample.differentiable]
    outputs = [t for t in tensors(function(*sample.args, **sample.kwargs)) if t.requires_grad]
    return outputs, leaves, [seed(o) for o in outputs]


def forward_backward(function: Callable) -> Call:
    seeds: dict[tuple, Tensor] = {}

    def call(sample: Sample) -> list[Tensor]:
        outputs, leaves, reached = _record(function, sample, seeds)
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, reached)]

    return call


def backward(function: Callable) -> Call:
    """The gradients alone: of each sample's forward pass, which is run once and kept."""
    seeds: dict[tuple, Tensor] = {}
    kept: dict[int, tuple] = {}

    def call(sample: Sample) -> list[Tensor]:
        if id(sample) not in kept:
            kept[id(sample)] = _record(function, sample, seeds)
        return list(torch.autograd.grad(*kept[id(sample)], retain_graph=True))

    return call


CALLS = {"forward": forward, "forward+backward": forward_backward, "backward": backward}


def directions(spec: OpSpec, sample: Sample) -> list[str]:
    """Of what is timed; the backward pass by itself where it has a target of its own."""
    return list(CALLS)[: (3 if spec is moe_layer.SPEC else 2) if sample.differentiable else 1]


def agrees(name: str, got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> str:
    """Why the tensors are not the expected ones, or ""."""
    limit = (AGREE if name == "llmcore" else PEER_AGREE).get(dtype, 0.0)
    for i, (a, b) in enumerate(zip(got, want)):
        if a.is_floating_point():
            error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            if not error <= limit:
                return f"tensor {i} is off by {error:.1e}"
        elif not torch.equal(a, b):
            return f"tensor {i} is another"
    return ""


def expected(spec: OpSpec, sample: Sample, direction: str) -> list[Tensor]:
    try:
        return CALLS[direction](spec.reference)(sample)
    except torch.OutOfMemoryError:  # the reference of attention holds all scores
        if spec.name != "attention":
            raise
        torch.cuda.empty_cache()
        return CALLS[direction](attention_peers()["sdpa_flash"])(sample)


def turn(call: Call, samples: list[Sample], capture: bool) -> tuple[Callable[[], None], bool]:
    """One turn of the ring, warmed up, and whether it is a CUDA graph: what takes microseconds would otherwise be timed
    with the launches that the host is late with. What can't be captured is launched by the host."""

    def launch() -> None:
        for sample in samples:
            call(sample)

    if not capture:
        launch()
        return launch, False
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        launch()  # warms up, compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except Exception:  # a call that waits for the device
        torch.cuda.synchronize()
        return launch, False
    return graph.replay, True


def microseconds(run: Callable[[], None], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def admitted(spec: OpSpec, samples: list[Sample], dtype: torch.dtype, direction: str) -> tuple[dict, list, dict]:
    """({name: one turn of the ring}, the names of those that are CUDA graphs, {peer that is left out: why}). All that
    is timed computes what the reference does."""
    # The references' gradients of most cases would not fit a card: those of ops are checked in tests/gpu alone.
    checked = direction if spec is moe_layer.SPEC else "forward"
    want = expected(spec, samples[0], checked)
    runs: dict[str, Callable[[], None]] = {}
    captured: list[str] = []
    left_out: dict[str, str] = {}
    for name, function in implementations(spec).items():
        try:
            outputs = CALLS[checked](function)(samples[0])
            check = getattr(function, "check", None)
            reason = check(samples[0], outputs) if check else agrees(name, outputs, want, dtype)
            del outputs
            # autograd runs a backward pass on the stream of its forward pass, here on one that is not captured
            run, is_graph = turn(CALLS[direction](Case.timed(function)), samples, capture=direction != "backward")
        except Exception as error:  # a peer that does not take this call
            if name == "llmcore":
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if reason and name == "llmcore":
            raise AssertionError(f"{spec.name}, {samples[0].label}: {reason}")
        if reason:
            left_out[name] = reason
            continue
        runs[name] = run
        captured += [name] * is_graph
    return runs, captured, left_out


def measure(spec: OpSpec, sample: Sample, dtype: torch.dtype, direction: str, rounds: int) -> dict:
    samples = ring(sample, direction != "forward")
    runs, captured, left_out = admitted(spec, samples, dtype, direction)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            took = microseconds(runs[name], len(samples))
            times[name] += [took] if number else []  # the first round warms up
    row = {
        "op": spec.name,
        "case": sample.label,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "us": {name: statistics.median(t) for name, t in times.items()},
        "captured": captured,
        "left_out": left_out,
    }
    own = row["us"]["llmcore"] * 1e-6
    if spec.flops:
        gradients = 2.5 if spec.name == "attention" else 2  # in forward passes
        passes = {"forward": 1, "forward+backward": 1 + gradients, "backward": gradients}[direction]
        row["tflops"] = spec.flops(sample) * passes / own / 1e12
    if spec.bytes and direction == "forward":
        row["gbytes"] = spec.bytes(sample) / own / 1e9
    return row


def judged(row: dict) -> dict:
    """The row with what peers take relative to llmcore, and what it must reach."""
    us = row["us"]
    ratio = {name: took / us["llmcore"] for name, took in us.items() if name != "llmcore"}
    return row | {"ratio": ratio, "must": MUST.get((row["op"], row["case"], row["direction"]), {})}


def ceilings(rounds: int) -> dict[str, float]:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1 << 28, device="cuda")  # 1 GiB
    y = torch.empty_like(x)

    def median(function: Callable) -> float:
        return statistics.median(microseconds(function, 1) for _ in range(rounds)) * 1e-6

    median(lambda: a @ b)  # warm
    return {
        "mm_bfloat16_tflops": 2 * n**3 / median(lambda: a @ b) / 1e12,
        "copy_gbytes": 2 * x.nbytes / median(lambda: y.copy_(x)) / 1e9,
    }


def describe(row: dict, limits: dict[str, float]) -> str:
    own, must = row["us"]["llmcore"], row["must"]
    rates = []
    if "tflops" in row:
        share = row["tflops"] / limits["mm_bfloat16_tflops"]
        rates.append((share, f"{row['tflops']:7.1f} TFLOP/s ({share:.2f} of mm)"))
    if "gbytes" in row:
        share = row["gbytes"] / limits["copy_gbytes"]
        wanted = f", must {must['gbytes']} GB/s" if "gbytes" in must else ""
        rates.append((share, f"{row['gbytes']:7.0f} GB/s    ({share:.2f} of copy{wanted})"))
    rate = max(rates)[1] if rates else ""  # what binds
    ratios = [f"{name} {r:5.2f}x{f' (must {must[name]})' if name in must else ''}" for name, r in row["ratio"].items()]
    ratios += [f"{name} left out: {reason}" for name, reason in row["left_out"].items() if name in must]
    name = f"{row['op']}: {row['case']}"[:48]
    return f"{name:48} {row['dtype']:9} {row['direction']:17} {own:9.1f} us  {rate:36} {'  '.join(ratios)}"


def served() -> list[tuple[OpSpec, torch.dtype]]:
    return [(registry[name], getattr(torch, d)) for name, row in support().items() for d in row.get("cuda", ())]


def run_small_samples(only: str) -> None:
    for spec, dtype in served():
        for sample in (s.to("cuda") for s in spec.samples(dtype, "cpu")) if only in spec.name else ():
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
    rows: list[dict] = []

    def add(row: dict) -> None:
        row = judged(row)
        rows.append(row)
        print(describe(row, limits), flush=True)
        if options.json:  # after every row: a run that is cut short keeps what it measured
            result = {"machine": info, "ceilings": limits, "results": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    if options.only in "optimizer":
        add(optimizer.measure(options.rounds, lambda step: microseconds(step, 1)))
    for spec, dtype in [(moe_layer.SPEC, torch.bfloat16), *served()]:
        if options.only not in spec.name or dtype not in (torch.bfloat16, torch.int32):
            continue  # float16 is as fast, float32 as fast per byte
        for sample in benchmarks(spec.name, dtype, "cuda"):
            for direction in directions(spec, sample):
                if time.monotonic() - began > options.seconds:
                    print(f"out of time: {spec.name} and what follows were not measured")
                    return
                add(measure(spec, sample, dtype, direction, options.rounds))


if __name__ == "__main__":
    main()
