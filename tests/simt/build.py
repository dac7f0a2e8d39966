"""Builds the test programs of tests/simt/CMakeLists.txt, once for all tests of a run."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "simt"


@functools.cache
def _built(name: str) -> str:
    """What was said when program `name` could not be built from the sources as they are now, or ""."""
    assert shutil.which("cmake"), "cmake is needed to build the test programs"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(HERE), "-B", str(BUILD), *generator]
    jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", name, "-j", jobs]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return ""


def program(name: str) -> Path:
    """The path of program `name`. It is built once for all tests, also when that fails."""
    assert not _built(name), _built(name)
    return BUILD / name
