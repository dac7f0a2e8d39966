"""Running the CUDA kernels on the emulator in a test build (docs/cuda.md)."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

import llmcore
from llmcore.ops import linear_cross_entropy_cuda, qk_norm_rope_cuda

# (schedule, copies): the least and the most orderly, and one that runs some warps far ahead
MODES = [("round_robin", "late"), ("priorities", "early"), ("random", "random")]


@contextmanager
def composed_as_on_cuda():
    """In the block, CPU tensors take the CUDA side also of those ops where it is Python around kernels."""
    library = torch.library.Library("llmcore", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in (linear_cross_entropy_cuda.IMPLEMENTATIONS | qk_norm_rope_cuda.IMPLEMENTATIONS).items():
            library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def emulator(schedule: str = "round_robin", copies: str = "late", seed: int = 1, **options):
    """In the block, ops on CPU tensors run their CUDA kernels on the emulator; skips where the build has none."""
    if "cuda_emulated" not in llmcore._C.cpu_isas():
        pytest.skip("this build has no emulated CUDA kernels (LLMCORE_EMULATE_CUDA)")
    before = llmcore._C.active_cpu_isa()
    llmcore._C.set_cpu_isa("cuda_emulated")
    llmcore._C.emulator_options(schedule, copies, seed, **options)
    try:
        with composed_as_on_cuda():
            yield
    finally:
        llmcore._C.emulator_options("round_robin", "late", 1)
        llmcore._C.set_cpu_isa(before)
