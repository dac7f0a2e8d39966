"""The table of the CPU kernels: each beside its peers and the machine's ceilings, with what it must reach.

    python bench/cpu_table.py [--only NAME] [--rounds 7] [--threads N] [--json FILE]

All calls of a row run in turns in one process; ratios are medians over the rounds. Ceilings are measured before the
first row and again after the last. Results are checked before they are timed. Run it alone: another busy process costs
spinning thread pools 2-5x.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

import bench.cpu
from bench.compare import ceilings, in_turns, machine
from bench.cpu import Row


def rows(only: str) -> Iterator[Row]:
    for module in sorted(m.name for m in pkgutil.iter_modules(bench.cpu.__path__)):
        for row in importlib.import_module(f"bench.cpu.{module}").rows():
            if only in f"{row.kernel} {row.case} {row.dtype} {row.direction}":
                yield row


def measure(row: Row, limits: dict[str, float], rounds: int) -> dict:
    row.check()
    ms, ratio = in_turns(row.calls, rounds)
    result = {
        "kernel": row.kernel, "case": row.case, "dtype": row.dtype, "direction": row.direction, "ms": ms,
        "ratio": ratio, "must": row.must, "aim": row.aim,
    }  # fmt: skip
    if row.ceiling:
        rate = row.work / ms["llmcore"] / 1e6
        result |= {"rate": rate, "ceiling": row.ceiling, "share": rate / limits[row.ceiling]}
        result |= {"must_share": row.must_share, "aim_share": row.aim_share}
    if row.notes:
        result["notes"] = row.notes()
    return result


def verdict(value: float, must: float | None, aim: float | None) -> str:
    if must is None and aim is None:
        return ""
    return "below" if must is not None and value < must else "aim" if aim is not None and value >= aim else "must"


def describe(result: dict) -> str:
    parts = [f"{result['kernel']}: {result['case']}"[:64].ljust(64), f"{result['dtype']:9} {result['direction']:17}"]
    parts.append(f"{result['ms']['llmcore']:10.3f} ms")
    for name, value in result["ratio"].items():
        word = verdict(value, result["must"].get(name), result["aim"].get(name))
        parts.append(f"{name} {value:.2f}x{' ' + word if word else ''}")
    if "rate" in result:
        word = verdict(result["share"], result["must_share"], result["aim_share"])
        parts.append(f"{result['rate']:.1f} = {result['share']:.2f} of {result['ceiling']}{' ' + word if word else ''}")
    parts += [f"{name} {value:g}" for name, value in result.get("notes", {}).items()]
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose kernel, case, dtype and direction contain this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    info, limits = machine(), ceilings(options.rounds)
    print("  ".join(f"{k}: {v}" for k, v in info.items()))
    print("ceilings: " + "  ".join(f"{k} {v:.1f}" for k, v in limits.items()), flush=True)
    results = []

    def keep(after: dict[str, float]) -> None:  # after every row: a run that is cut short keeps what it measured
        if options.json:
            everything = {"machine": info, "ceilings": limits, "ceilings_after": after, "results": results}
            options.json.write_text(json.dumps(everything, indent=1) + "\n")

    for row in rows(options.only):
        results.append(measure(row, limits, options.rounds))
        print(describe(results[-1]), flush=True)
        keep({})
    keep(ceilings(options.rounds))


if __name__ == "__main__":
    main()
