"""grouped_gemm beyond the registry's samples."""

import pytest
import torch

from llmcore import ops


@pytest.fixture
def nan_in_new_memory():
    """torch fills what torch.empty gives with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_gradients_of_experts_without_rows_are_zeros(isa, dtype, nan_in_new_memory):
    """Those of more than 8 MiB are written past the caches; rows of 1031 elements begin at all kinds of addresses."""
    experts, n, k, rows = 9, 641, 1031, [0, 2, 0, 9, 0, 0, 1, 0, 0]
    offsets = torch.tensor([0, *rows]).cumsum(0).int()
    make = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), k, generator=make).to(dtype)
    weight = torch.randn(experts, n, k, generator=make).to(dtype).requires_grad_()
    dy = torch.randn(sum(rows), n, generator=make).to(dtype)
    (dweight,) = torch.autograd.grad(ops.grouped_gemm(x, weight, offsets), weight, dy)
    assert dweight.nbytes > 8 << 20
    for e in range(experts):
        part = slice(int(offsets[e]), int(offsets[e + 1]))
        want = dy[part].double().t() @ x[part].double()
        limit = torch.finfo(dtype).eps / 2 + 3e-7  # of one rounding, and of float32 sums of up to 9 products
        assert (dweight[e].double() - want).norm() <= limit * want.norm()  # exactly 0 without rows
