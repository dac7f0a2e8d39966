"""The CUDA kernels on a GPU: every sample of the registry, kernel against reference, by the rule of all ops."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import registry, support
from tests.ops.checks import check_sample

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")


def cases():
    for name, served in support().items() if HAS_GPU else ():
        for dtype in served.get("cuda", ()):
            for sample in registry[name].samples(getattr(torch, dtype), "cpu"):
                yield pytest.param(registry[name], sample, id=f"{name}-{dtype}-{sample.label}")


@pytest.mark.parametrize(("spec", "sample"), list(cases()))
def test_cuda_kernel_matches_reference(spec, sample):
    with llmcore.backend("kernel"):
        check_sample(spec, sample.to("cuda"))
    torch.cuda.synchronize()  # an error of this sample, not of the next
