"""Peak memory of a call, in a process of its own.

    python bench/peak.py bench.cpu.loss:peak_call '["llmcore", 2048, 512, 8192, "bfloat16"]'

MODULE:FUNCTION(*arguments) gives the call and, maybe, one that warms up libraries and thread pools. What is printed is
how many bytes the resident set rose above its size just before the call: the most that the call held at a time, its
outputs included. Linux only: the kernel's high-water mark is reset through /proc/self/clear_refs.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset), bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) << 10


def measure(call, warm_up=None) -> int:
    if warm_up:
        warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left must not be counted as there already
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = call()  # alive until the mark is read
    peak = _resident("VmHWM")
    del kept
    return peak - before


def peak_bytes(where: str, *arguments) -> int:
    """`measure` of what `where` ("module:function") makes of `arguments` (plain JSON), in a fresh process."""
    import torch

    threads = str(torch.get_num_threads())
    command = [sys.executable, str(Path(__file__).resolve()), where, json.dumps(arguments), threads]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])


def main() -> None:
    import torch

    sys.path.append(str(ROOT))
    where, arguments, *threads = sys.argv[1:]
    if threads:
        torch.set_num_threads(int(threads[0]))
    module, function = where.split(":")
    calls = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(measure(*calls) if isinstance(calls, tuple) else measure(calls))


if __name__ == "__main__":
    main()
