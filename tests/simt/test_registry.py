"""The CUDA kernels on the emulator: every sample of the registry, kernel against reference, under legal but hostile
schedules (docs/cuda.md). Needs a build with -DLLMCORE_EMULATE_CUDA=ON."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import registry
from llmcore.ops.registry import FLOATS
from tests.ops.checks import check_sample

EMULATED = "cuda_emulated"
pytestmark = pytest.mark.skipif(
    EMULATED not in llmcore._C.cpu_isas(), reason="this build has no emulated CUDA kernels (LLMCORE_EMULATE_CUDA)"
)

HALVES = (torch.bfloat16, torch.float16)
# op -> the dtypes its CUDA kernel serves
CUDA_OPS = {
    "attention": HALVES,
    "geglu": FLOATS,
    "swiglu": FLOATS,
}
# (schedule, copies): the least and the most orderly, and one that runs some warps far ahead
MODES = [("round_robin", "late"), ("priorities", "early"), ("random", "random")]


def cases():
    for name, dtypes in CUDA_OPS.items():
        for dtype in dtypes:
            for sample in registry[name].samples(dtype, "cpu"):
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{sample.label}"
                yield pytest.param(registry[name], sample, id=label)


@pytest.fixture(params=MODES, ids="-".join)
def emulated(request):
    before = llmcore._C.active_cpu_isa()
    assert llmcore._C.set_cpu_isa(EMULATED)
    llmcore._C.emulator_options(*request.param, 1)
    yield
    llmcore._C.emulator_options("round_robin", "late", 1)
    llmcore._C.set_cpu_isa(before)


@pytest.mark.parametrize(("spec", "sample"), list(cases()))
def test_cuda_kernel_matches_reference(spec, sample, emulated):
    with llmcore.backend("kernel"), torch.random.fork_rng():
        check_sample(spec, sample)
