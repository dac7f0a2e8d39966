"""Peers timed in turns: what bench/report.py and bench/cpu_table.py share."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import llmcore


def seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def median_seconds(function: Callable, rounds: int) -> float:
    function()
    return statistics.median(seconds(function) for _ in range(rounds))


def in_turns(calls: dict[str, Callable], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """({name: median milliseconds}, {peer: median over the rounds of peer time / llmcore time}): all run once in every
    round, so that a noisy machine disturbs them alike. They go round in a circle, half of the rounds either way (an odd
    number becomes even): each follows every neighbour as often, and none itself, or it would find its own tensors in
    cache."""
    for call in calls.values():
        call()  # warm up
    times: dict[str, list[float]] = {name: [] for name in calls}
    circle, half = list(calls), (rounds + 1) // 2
    for turn in range(2 * half):
        for name in circle if turn < half else circle[:1] + circle[:0:-1]:
            times[name].append(seconds(calls[name]))
    ratio = {
        name: statistics.median(peer / own for peer, own in zip(t, times["llmcore"]))
        for name, t in times.items()
        if name != "llmcore"
    }
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}, ratio


def ceilings(rounds: int) -> dict[str, float]:
    """What torch reaches here: matrix products (GFLOP/s) and memory (GB/s)."""
    n = 1024
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        name = f"gemm_{str(dtype).removeprefix('torch.')}_gflops"
        result[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, rounds) / 1e9
    x = torch.randn(1 << 26)  # 256 MiB
    y = torch.empty_like(x)
    result["copy_gbytes"] = 2 * x.nbytes / median_seconds(lambda: y.copy_(x), rounds) / 1e9
    result["read_gbytes"] = x.nbytes / median_seconds(x.sum, rounds) / 1e9
    return result


def machine() -> dict[str, str]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model,
        "cpu_isa": llmcore.build_info()["active_cpu_isa"],
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "date": date.today().isoformat(),
        "command": _command(),
    }


def _command() -> str:
    """The command line, without where things lie on this machine."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    script = "bench/" + Path(sys.argv[0]).name
    return " ".join(["python", script, *(f'"{word}"' if " " in word else word for word in words)])
