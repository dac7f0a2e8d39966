"""Times every op against torch's own and prints the ratios beside the machine's ceilings.

    python bench/report.py [--only NAME] [--dtype float32] [--rounds 7] [--threads N] [--reference] [--json FILE]

Implementations run alternately in one process, so that a noisy machine disturbs them alike; a ratio is the median over
the rounds of peer time / llmcore time. Results are checked before they are timed. Time it alone: another busy process
costs spinning thread pools 2-5x.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

from bench.cases import Case, cases
from bench.compare import ceilings, in_turns, machine


def measure(case: Case, rounds: int, with_reference: bool) -> dict:
    case.check()
    functions = {name: case.timed(function) for name, function in case.implementations().items()}
    if not with_reference and "torch" in functions:
        functions.pop("reference")
    ms, ratio = in_turns({name: partial(case.call, function) for name, function in functions.items()}, rounds)
    row = {
        "op": case.spec.name,
        "case": case.sample.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "ms": ms,
        "ratio": ratio,
    }
    kind, work = case.work()
    if kind:
        row["g" + kind + "s"] = work / ms["llmcore"] / 1e6
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
