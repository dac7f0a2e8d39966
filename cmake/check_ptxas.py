"""Compiles a .cu file with nvcc and fails when its kernels don't fit their registers.

A kernel that spills, keeps an array in local memory, or that ptxas warns about (such as C7510, a wgmma pipeline that
it serialises) still gives right results: only this report shows it, and only a GPU would feel it. CMake puts this
script in front of nvcc when LLMCORE_CUDA_STRICT is ON. Prints a table of what every kernel takes on every architecture.

Usage: check_ptxas.py NVCC ARGUMENT...
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# (file, pattern that is searched for in "KERNEL ARCHITECTURE") -> why what ptxas reports is accepted. An entry that
# nothing needs any more is an error.
ALLOWED: dict[tuple[str, str], str] = {}


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    static_shared: int = 0  # bytes; dynamic shared memory is known at the launch only
    stack: int = 0  # bytes, spills included
    spills: int = 0  # bytes stored and loaded
    warnings: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        found = [f"spills {self.spills} bytes"] if self.spills else []
        if self.stack and not self.spills:
            found.append(f"keeps {self.stack} bytes in local memory")
        return found + self.warnings


def parse(report: str) -> list[Kernel]:
    """The kernels of a `ptxas -v` report, in its order."""
    kernels: list[Kernel] = []
    outside = Kernel("(the file)", "")
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for '(.+)'", line):
            kernels.append(Kernel(*entry.groups()))
            continue
        kernel = kernels[-1] if kernels else outside
        if sizes := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, sizes.groups())
            # properties of a called device function follow those of the kernel
            kernel.stack, kernel.spills = max(kernel.stack, stack), max(kernel.spills, stores + loads)
        if used := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(used.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.static_shared = int(shared.group(1)) if shared else 0
        if line.startswith("ptxas") and ("warning" in line.lower() or re.search(r"\(C\d+\)", line)):
            kernel.warnings.append(line.strip())
    return [*kernels, *([outside] if outside.warnings else [])]


def demangle(names: list[str]) -> list[str]:
    """As short as can be told apart: without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in text.splitlines():
        line = re.sub(r"\((anonymous namespace|_GLOBAL__N__\w+)\)::|_GLOBAL__N__\w+::", "", line)
        line = re.sub(r"\([^()]*\)$", "", re.sub(r"\b[a-z_]\w*::(?=\w)", "", line))
        short.append(re.sub(r"^void ", "", re.sub(r"\((int|bool|unsigned int)\)", "", line)))
    return short


def check(file: str, kernels: list[Kernel], allowed: dict[tuple[str, str], str]) -> list[str]:
    """The faults that no entry of `allowed` covers, and the entries that cover none."""
    errors, needed = [], set()
    for kernel in kernels:
        covering = {
            (of, pattern)
            for of, pattern in allowed
            if of == file and re.search(pattern, f"{kernel.name} {kernel.architecture}")
        }
        if kernel.faults() and covering:
            needed |= covering
        elif kernel.faults():
            errors.append(f"{file}: {kernel.name} on {kernel.architecture}: {'; '.join(kernel.faults())}")
    idle = [pattern for of, pattern in allowed if of == file and (of, pattern) not in needed]
    return errors + [f"{file}: the exception {pattern!r} of check_ptxas.py is not needed" for pattern in idle]


def table(kernels: list[Kernel]) -> str:
    lines = [f"{'registers':>9} {'stack':>6} {'static shared':>13}  architecture kernel"]
    for k in sorted(kernels, key=lambda k: (k.architecture, k.name)):
        lines.append(f"{k.registers:9} {k.stack:6} {k.static_shared:13}  {k.architecture:12} {k.name}")
    return "\n".join(lines)


def main(command: list[str]) -> int:
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
    report = done.stdout + done.stderr
    if done.returncode:
        print(report, file=sys.stderr)
        return done.returncode
    kernels = parse(report)
    other = [line for line in report.splitlines() if line.strip() and not re.match(r"ptxas| +\d+ bytes stack", line)]
    if other:
        print("\n".join(other), file=sys.stderr)
    file = next((Path(word).name for word in command if word.endswith(".cu")), "?")
    for kernel, name in zip(kernels, demangle([k.name for k in kernels])):
        kernel.name = name
    errors = check(file, kernels, ALLOWED)
    if kernels:
        print(f"{file}:\n{table(kernels)}")
    for error in errors:
        print(error, file=sys.stderr)
    if errors:  # the build must not take the object for good the next time
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
