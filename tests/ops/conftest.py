from __future__ import annotations

import pytest
import torch

import llmcore


@pytest.fixture(params=llmcore._C.cpu_isas())
def isa(request):
    """Each instruction set that this machine runs in turn."""
    before = llmcore._C.active_cpu_isa()
    assert llmcore._C.set_cpu_isa(request.param)
    yield request.param
    llmcore._C.set_cpu_isa(before)


@pytest.fixture
def threads():
    """`threads(n)` sets how many torch may use, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
