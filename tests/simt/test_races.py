"""The CUDA kernels on the emulator under ThreadSanitizer: no race in any of them, under two schedules that are as
unlike as can be; and the races planted in tests/simt/programs are reported. A kernel is added to tests/simt/races."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.simt.build import BUILD, program

HERE = Path(__file__).resolve().parent
MODES = [("round_robin", "late"), ("priorities", "early")]
REPORTED = 66  # what `races` ends with at the first report


def launchers() -> list[str]:
    """The kernels that csrc/include or a header of csrc/cuda declares, and csrc/cuda defines."""
    csrc = HERE.parents[1] / "csrc"
    headers = "".join(path.read_text() for path in sorted((csrc / "include/llmcore").glob("*.h")))
    sources = "".join(path.read_text() for path in sorted((csrc / "cuda").glob("*.cu")))
    declared = re.findall(r"^LLMCORE_CUDA_KERNEL\((\w+),", headers, re.MULTILINE)
    internal = "".join(path.read_text() for path in sorted((csrc / "cuda").glob("*.cuh")))
    declared += re.findall(r"^Status (\w+)\(const \w+Params& p, const Device& device\);", internal, re.MULTILINE)
    return [name for name in declared if re.search(rf"^Status {name}\(", sources, re.MULTILINE)]


@functools.cache
def without_aslr() -> list[str]:
    """Older runtimes give up ("unexpected memory mapping") where the kernel spreads addresses over more bits."""
    command = ["setarch", "-R"]
    works = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


@functools.cache
def races() -> Path:
    try:
        return program("races")
    except AssertionError:
        cache = BUILD / "CMakeCache.txt"
        if cache.exists() and "tsan_with_fibers:INTERNAL=1" not in cache.read_text() and "CI" not in os.environ:
            pytest.skip(
                "the C++ compiler has no ThreadSanitizer runtime with fibers (libtsan of GCC 10 or Clang 10 on)"
            )
        raise


def run(case: str, mode: tuple[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([*without_aslr(), races(), case, *mode], capture_output=True, text=True, timeout=300)


def listed(kind: str) -> list[list[str]]:
    done = subprocess.run([*without_aslr(), races(), "--list"], capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(kind)]


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("kernel", launchers())
def test_kernel_has_no_race(kernel, mode):
    assert [kernel] in listed("kernel"), f"{kernel} has no RACE_CASE in tests/simt/races"
    done = run(kernel, mode)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_right_programs_have_no_race(mode):
    for (name,) in listed("correct"):
        done = run(name, mode)
        assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_planted_races_are_reported(mode):
    for name, late, early in listed("planted"):
        done = run(name, mode)
        expected = REPORTED if (late if mode[1] == "late" else early) == "1" else 0
        assert done.returncode == expected, f"{name}: {done.stderr or 'not reported'}"
        assert ("data race" in done.stderr) == (expected == REPORTED), f"{name}: {done.stderr}"
