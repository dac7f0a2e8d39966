"""What a training step and a decode step cost besides their kernels: Python, the dispatcher, autograd, hidden copies.

    python bench/overhead.py [--layers 12] [--threads N] [--json FILE]

1. The step's calls of torch operators, its time, and the operators that it goes to; the time of the very same calls on
   tiny tensors, which is what they cost besides their work.
2. Microseconds of one call of each op on tiny tensors: in inference mode, under no_grad, forward and backward.
3. Copies, casts and fills: shape, dtype, and the line of llmcore that they come from (in a backward pass, the formula).
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

from bench.compare import median_seconds
from bench.cpu.step import ROW_LEN, ROWS, our_model
from bench.model import our_step, text
from llmcore import ops
from llmcore.inference.cache import PagedKVCache
from llmcore.inference.decoder import Decoder

MOVES = ("clone", "copy_", "_to_copy", "cat", "stack", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "full")
TINY = {"dim": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32, "vocab_size": 64}
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts operators, and remembers where copies of more than `floor` elements come from."""

    def __init__(self, floor: int) -> None:
        super().__init__()
        self.floor = floor
        self.count: collections.Counter[str] = collections.Counter()
        self.moves: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count[f"{function.namespace}::{name}"] += 1
        if name in MOVES and isinstance(out, torch.Tensor) and out.numel() >= self.floor:
            dtype = str(out.dtype).removeprefix("torch.")
            self.moves[f"{name} {tuple(out.shape)} {dtype}, {_line()}"] += 1
        return out


def _line() -> str:
    """The innermost line of llmcore that is not this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "llmcore" in frame.filename and "/bench/" not in frame.filename:
            path = frame.filename[frame.filename.rindex("llmcore") :]
            return f"{path}:{frame.lineno} {frame.name}"
    return "backward (torch's own formula)"


def training(layers: int, tiny: bool) -> Callable[[], object]:
    model = our_model(torch.bfloat16, num_layers=layers, **(TINY if tiny else {}))
    rows, length = (1, 8) if tiny else (ROWS, ROW_LEN)
    return our_step(model, text(rows, length, model.config.vocab_size, CPU))


def decoding(
    layers: int, tiny: bool, batch: int = 1, context: int = 128, op_by_op: bool = False
) -> Callable[[], object]:
    """One token for each of `batch` sequences, as `generate` does it, or with a call for each op. The cache does not
    grow: a step is repeatable."""
    model = our_model(torch.bfloat16, num_layers=layers, **(TINY if tiny else {})).eval()
    context = 8 if tiny else context
    blocks = PagedKVCache.blocks_for(context + 1)
    cache = PagedKVCache(model.config, batch * blocks, dtype=torch.bfloat16)
    cache.extend(range(batch), [context] * batch)
    decoder, tokens = Decoder(model, cache), torch.zeros(batch, dtype=torch.int64)

    @torch.inference_mode()
    def step() -> None:
        room = cache.extend(range(batch), [1] * batch)
        hidden = model(tokens, cache=room).hidden if op_by_op else decoder.hidden(tokens, room)
        ops.sample(model.logits(hidden), temperature=0.0)[0].tolist()
        for sequence in range(batch):
            cache.truncate(sequence, context)

    return step


def single_ops() -> dict[str, Callable[[], object]]:
    """Public ops on tiny tensors; each gives a differentiable tensor."""
    make = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).bfloat16().requires_grad_()

    x, residual, gain, gate, up = leaf(1, 32), leaf(1, 32), leaf(32), leaf(1, 32), leaf(1, 32)
    q, k, v = leaf(1, 2, 16), leaf(1, 1, 16), leaf(1, 1, 16)
    cos, sin = ops.rope_tables(8, 16)
    position, targets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    offsets, weight = torch.tensor([0, 1], dtype=torch.int32), leaf(64, 32)
    return {
        "rms_norm": lambda: ops.rms_norm(x, gain),
        "rms_norm + residual": lambda: ops.rms_norm(x, gain, residual=residual)[0],
        "rope": lambda: ops.rope(q, cos, sin, position),
        "swiglu": lambda: ops.swiglu(gate, up),
        "attention, packed": lambda: ops.attention(q, k, v, causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, weight, targets, reduction="sum"),
        "torch: linear": lambda: torch.nn.functional.linear(x, weight),
        "torch: silu": lambda: torch.nn.functional.silu(x),
    }


def per_call(call: Callable[[], object], calls: int = 300) -> float:
    """Microseconds, the median of 7 runs of `calls` calls."""

    def run() -> None:
        for _ in range(calls):
            call()

    return median_seconds(run, 7) / calls * 1e6


def count(step: Callable[[], object], floor: int) -> Calls:
    with Calls(floor) as calls:
        step()
    return calls


def own_times(step: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """operator -> (calls, milliseconds in it alone), the longest first, with those that bindings call, which the mode
    does not see."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    return {e.key: (e.count, e.self_cpu_time_total / 1e3) for e in events if e.self_cpu_time_total > 0}


def report_step(name: str, make: Callable[[bool], Callable[[], object]], floor: int, rounds: int) -> dict:
    step, tiny = make(False), make(True)
    for call in (step, tiny):
        call()
        call()
    calls = count(step, floor)
    total, bare = median_seconds(step, rounds) * 1e3, median_seconds(tiny, 5 * rounds) * 1e3
    number = sum(calls.count.values())
    print(f"\n{name}: {number} operator calls, {total:.2f} ms; on tiny tensors {bare:.2f} ms = {bare / total:.1%}")
    print("  " + "  ".join(f"{n} {op}" for op, n in calls.count.most_common(24)))
    for move, times in calls.moves.most_common():
        print(f"  {times:4}x {move}")
    times = own_times(step)
    whole = sum(ms for _, ms in times.values())
    print("  time: " + "  ".join(f"{name} {ms / whole:.1%}" for name, (_, ms) in list(times.items())[:12]))
    moves = {name: entry for name, entry in times.items() if name.removeprefix("aten::") in MOVES}
    print("  with those in bindings: " + "  ".join(f"{n} {name} {ms:.2f} ms" for name, (n, ms) in moves.items()))
    return {"calls": dict(calls.count), "moves": dict(calls.moves), "own_times": times, "ms": total, "tiny_ms": bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, dict] = {"ops": {}}
    print("microseconds of one call on tiny tensors: inference mode, no_grad, forward + backward")
    for name, op in single_ops().items():
        with torch.inference_mode():
            inference = per_call(op)
        with torch.no_grad():
            plain = per_call(op)
        seed = torch.ones_like(op().detach())
        both = per_call(lambda op=op, seed=seed: op().backward(seed))
        result["ops"][name] = {"inference_us": inference, "no_grad_us": plain, "both_us": both}
        print(f"  {name:24} {inference:8.1f} {plain:8.1f} {both:8.1f}")
    what = {
        "training step": (lambda tiny: training(options.layers, tiny), 2048, 5),
        "decode step, 1 sequence": (lambda tiny: decoding(options.layers, tiny), 2, 50),
        "decode step, 16 sequences": (lambda tiny: decoding(options.layers, tiny, batch=16), 2, 30),
        "decode step op by op, 1 sequence": (lambda tiny: decoding(options.layers, tiny, op_by_op=True), 2, 50),
        "decode step op by op, 16 sequences": (lambda tiny: decoding(options.layers, tiny, 16, op_by_op=True), 2, 30),
    }
    for name, arguments in what.items():
        result[name] = report_step(name, *arguments)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
