"""Drives CMakeLists.txt, the one build description. `pip install .` is all a user needs.

Environment:
    LLMCORE_CUDA=auto|on|off   auto (default): build the CUDA kernels when nvcc is there and torch was built for CUDA;
                               on: whenever nvcc is there, an error if it is not; off: never.
    LLMCORE_SANITIZE=address,undefined   sanitizers for the C++ code (for tests; the process must preload libasan).
    LLMCORE_CMAKE_ARGS="..."   further arguments for CMake, such as -DLLMCORE_WERROR=ON.
    MAX_JOBS=N                 compile jobs; by default one per core, at most one per 2 GiB of available memory.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def bounded_jobs() -> int:
    """One job per usable core, bounded by memory: a kernel translation unit peaks below 2 GiB."""
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdecimal() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS={wanted!r}: expected a number from 1 up")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # free memory would not count the page cache, which gives way to a compiler
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(meminfo["MemAvailable"].removesuffix("kB")) << 10
    except (OSError, KeyError):
        return cores
    return max(1, min(cores, available // (2 << 30)))


def cuda_decision() -> tuple[str, str]:
    """(nvcc to build CUDA with or "", the reason that is printed and kept in the build info)."""
    import torch

    mode = os.environ.get("LLMCORE_CUDA", "auto").lower()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"LLMCORE_CUDA={mode!r}: expected auto, on or off")
    if mode == "off":
        return "", "LLMCORE_CUDA=off"
    if not nvcc:
        if mode == "on":
            raise SystemExit("LLMCORE_CUDA=on, but nvcc was not found on PATH or in /usr/local/cuda/bin")
        return "", "nvcc was not found"
    if mode == "auto" and torch.version.cuda is None:
        return "", f"torch {torch.__version__} was built without CUDA (LLMCORE_CUDA=on builds the kernels anyway)"
    return nvcc, f"{nvcc}, torch CUDA {torch.version.cuda}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        started = time.monotonic()
        nvcc, why = cuda_decision()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            # a reused build folder remembers the ninja of an isolated build environment that is gone
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLLMCORE_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DLLMCORE_TORCH_VERSION={torch.__version__}",
            f"-DLLMCORE_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DLLMCORE_CUDA_REASON={why}",
            f"-DLLMCORE_SANITIZE={os.environ.get('LLMCORE_SANITIZE', '')}",
            f"-DLLMCORE_OUTPUT_DIR={target.parent}",
            f"-DLLMCORE_OUTPUT_NAME={target.name}",
            # options a build folder would otherwise remember from an earlier run
            "-DLLMCORE_WERROR=OFF",
            "-DLLMCORE_EMULATE_AVX512=OFF",
            "-DLLMCORE_EMULATE_CUDA=OFF",
            "-DLLMCORE_CUDA_STRICT=OFF",
            "-DLLMCORE_ISAS=",
            *shlex.split(os.environ.get("LLMCORE_CMAKE_ARGS", "")),
        ]
        # CUDACXX: nvcc need not be on PATH; a build folder keeps the one it began with
        subprocess.run(configure, check=True, env={**os.environ, "CUDACXX": nvcc} if nvcc else None)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", str(bounded_jobs())], check=True)
        summary = (build_dir / "llmcore_build_summary.txt").read_text().strip()
        print(f"llmcore: built {summary} in {time.monotonic() - started:.0f} s")


setup(ext_modules=[Extension("llmcore._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
