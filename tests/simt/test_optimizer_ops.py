"""The CUDA kernels of the optimizer on tensors that do not start at a multiple of 16 bytes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_optimizer_ops import check_adamw_at_odd_addresses, check_norm_at_odd_addresses


@pytest.mark.parametrize("name", ["weights", "masters", "grads", "exp_avgs", "exp_avg_sqs", "all"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_adamw_at_odd_addresses(name, dtypes, emulated):
    check_adamw_at_odd_addresses(name, *dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_at_odd_addresses(dtype, emulated):
    check_norm_at_odd_addresses(dtype)
