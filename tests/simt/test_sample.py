"""The CUDA kernels of sampling on the emulator, beyond the registry's samples: bit for bit the CPU kernel's results."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops
from llmcore.ops.registry import FLOATS
from tests.ops.test_sample import assert_equal_bits, random_calls
from tests.simt.emulation import MODES, emulator


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1000, 40), (200, 331), (40, 4096)])
def test_same_bits_as_the_cpu_kernel(dtype, rows, vocab):
    logits, settings = random_calls(dtype, rows, vocab, seed=vocab)
    want = ops.sample(logits, **settings)
    with emulator():
        assert_equal_bits(ops.sample(logits, **settings), want)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_vocabularies(dtype, mode):
    """More digits of an index, several turns of the loop over a row, and rows that are not aligned."""
    for vocab in (65536, 65537, 262144):
        logits, settings = random_calls(dtype, 2, vocab, seed=vocab)
        logits[1] = logits[1].round()
        settings |= {
            "temperature": torch.ones(2),
            "top_k": torch.tensor([0, 50_001]),
            "top_p": torch.tensor([0.9, 0.7]),
        }
        want = ops.sample(logits, **settings)
        with emulator(*mode):
            assert_equal_bits(ops.sample(logits, **settings), want)


def test_rows_that_are_no_distribution(emulated):
    """The binding of a CPU tensor looks, so the row's number shows that the kernel marked it."""
    for bad in (torch.nan, -torch.nan, torch.inf, None):
        for temperature in (0.0, 1.0):
            logits = torch.zeros(3, 700)
            logits[1, 699] = bad or 0
            if bad is None:
                logits[1] = -torch.inf
            with pytest.raises(RuntimeError, match=r"sample: the logits of row 1 hold NaN or \+inf, or are all -inf"):
                ops.sample(logits, temperature=temperature)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_penalties_give_the_cpu_kernel_s_bits(mode):
    make = torch.Generator().manual_seed(0)
    for dtype in FLOATS:
        got = (torch.randn(2, 20_000, generator=make) * 3).to(dtype)
        want = got.clone()
        tokens = torch.randint(-1, 20_000, (2, 3000), generator=make)
        tokens[:, ::7] = 8191
        tokens[:, 1::7] = 8192  # the first of the second part
        settings = {"repetition": 1.3, "presence": 0.7, "frequency": 0.1}
        ops.apply_penalties_(want, tokens, torch.tensor([1000, 0]), **settings)
        with emulator(*mode):
            ops.apply_penalties_(got, tokens, torch.tensor([1000, 0]), **settings)
        assert torch.equal(got, want)
