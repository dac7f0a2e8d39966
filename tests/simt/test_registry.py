"""The CUDA kernels on the emulator: every sample of the registry, kernel against reference, under legal but hostile
schedules (docs/cuda.md). Needs a build with -DLLMCORE_EMULATE_CUDA=ON."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import registry
from tests.ops.checks import check_sample

CUDA_OPS = {name: spec.dtypes["cuda"] for name, spec in registry.items() if "cuda" in spec.dtypes}


def cases():
    for name, dtypes in CUDA_OPS.items():
        for dtype in dtypes:
            for sample in registry[name].samples(dtype, "cpu"):
                if sample.cpu_only:
                    continue
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{sample.label}"
                yield pytest.param(registry[name], sample, id=label)


@pytest.mark.parametrize(("spec", "sample"), list(cases()))
def test_cuda_kernel_matches_reference(spec, sample, emulated):
    with llmcore.backend("kernel"), torch.random.fork_rng():
        check_sample(spec, sample)
