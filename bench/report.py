"""Times every op against torch's own and prints the ratios beside the machine's ceilings.

    python bench/report.py [--only NAME] [--dtype float32] [--rounds 7] [--threads N] [--reference] [--json FILE]

Implementations run alternately in one process, so that a noisy machine disturbs them alike; a ratio is the median over
the rounds of peer time / llmcore time. Results are checked before they are timed. Time it alone: another busy process
costs spinning thread pools 2-5x.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

import llmcore
from bench.cases import Case, cases


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def median_seconds(function, rounds: int) -> float:
    function()
    return statistics.median(seconds(function) for _ in range(rounds))


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


def measure(case: Case, rounds: int, with_reference: bool) -> dict:
    case.check()
    functions = {name: case.timed(function) for name, function in case.implementations().items()}
    if not with_reference and "torch" in functions:
        functions.pop("reference")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        case.call(function)  # warm up
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(case.call, function))
    row = {
        "op": case.spec.name,
        "case": case.sample.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "ratio": {
            name: statistics.median(peer / own for peer, own in zip(t, times["llmcore"]))
            for name, t in times.items()
            if name != "llmcore"
        },
    }
    kind, work = case.work()
    if kind:
        row["g" + kind + "s"] = work / statistics.median(times["llmcore"]) / 1e9
    return row


def describe(row: dict, limits: dict[str, float]) -> str:
    rate = ""
    if "gflops" in row:
        rate = f"{row['gflops']:7.1f} GFLOP/s ({row['gflops'] / limits['gemm_float32_gflops']:.2f} of fp32 GEMM)"
    elif "gbytes" in row:
        rate = f"{row['gbytes']:7.1f} GB/s    ({row['gbytes'] / limits['copy_gbytes']:.2f} of copy)"
    ratios = "  ".join(f"{name} {value:6.2f}x" for name, value in row["ratio"].items())
    name = f"{row['op']}: {row['case']}"
    return f"{name[:58]:58} {row['dtype']:9} {row['direction']:17} {row['ms']['llmcore']:9.3f} ms  {ratios:32} {rate}"


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
        "command": " ".join(["python", "bench/report.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"], help="only this dtype")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="time the pure-torch reference too")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    info, limits = machine(), ceilings(options.rounds)
    print("  ".join(f"{k}: {v}" for k, v in info.items()))
    print("ceilings: " + "  ".join(f"{k} {v:.1f}" for k, v in limits.items()), flush=True)
    rows = []
    for case in cases(only=options.only):
        if options.dtype not in str(case.dtype):
            continue
        rows.append(measure(case, options.rounds, options.reference))
        print(describe(rows[-1], limits), flush=True)
        if options.json:  # after every row: a run that is cut short keeps what it measured
            options.json.write_text(json.dumps({"machine": info, "ceilings": limits, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
