"""The tile list of the grouped GEMM, which the device makes of the offsets: distributions of rows that a wrong search
or a forgotten tile would show in. Results start as NaN: a row which nobody writes can't pass for a right one."""

from __future__ import annotations

import pytest
import torch

import llmcore
from llmcore.ops import Sample, registry
from llmcore.ops.grouped_gemm import assignments, offsets_of
from tests.ops.checks import check_sample
from tests.simt.emulation import emulator


def on(num_experts: int, rows: dict[int, int]) -> list[int]:
    return [rows.get(e, 0) for e in range(num_experts)]


# At most 16 rows for each expert on average: tiles of 16 rows.
FEW = {
    "first of 512": on(512, {0: 17}),
    "last of 512": on(512, {511: 17}),
    "every 37th of 512": on(512, {e: 1 + e % 19 for e in range(0, 512, 37)}),
    "one each": [1] * 65,
    "whole tiles": on(33, {0: 16, 15: 32, 16: 48, 32: 16}),
    "a row beyond": on(33, {1: 17, 31: 33, 32: 1}),
    "a row short": on(34, {0: 15, 16: 31, 33: 15}),
    "all on one, groups of tiles": on(20, {7: 16 * 18 + 3}),
    "exactly 16 each": [16] * 3,
    "one expert": [9],
}
# More: tiles of 128.
MANY = {
    "whole tiles": [128, 0, 256, 0],
    "a row beyond": [129, 0, 257, 1],
    "a row short": [0, 127, 255, 0, 3],
    "all on the last": on(33, {32: 600}),
    "all on the first": on(33, {0: 600}),
    "17 each": [17] * 2,
    "all on one, groups of tiles": [0, 128 * 17 + 5, 0],
}


def sample(label: str, rows: list[int], n: int, k: int, top_k: int = 0, gradients: bool = False, **kwargs) -> Sample:
    make = torch.Generator().manual_seed(len(label))
    if top_k:
        rows = [*rows[:-1], rows[-1] + -sum(rows) % top_k]
        kwargs |= assignments(rows, top_k, make, "cpu")
    x = torch.randn(sum(rows) // max(top_k, 1), k, generator=make).bfloat16()
    weight = (torch.randn(len(rows), n, k, generator=make) * k**-0.5).bfloat16()
    return Sample(label, (x, weight, offsets_of(rows, "cpu")), kwargs, (0, 1) if gradients else ())


@pytest.fixture
def nan_in_new_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_glu"])
@pytest.mark.parametrize(
    ("label", "rows"),
    [*FEW.items(), *MANY.items()],
    ids=[f"{a}-{b}" for a, d in (("few", FEW), ("many", MANY)) for b in d],
)
def test_every_row_is_its_experts(op, label, rows, nan_in_new_memory):
    columns = 264 if "groups" in label else 8  # two blocks of columns and more, where tiles go by groups
    with emulator(), llmcore.backend("kernel"):
        check_sample(registry[op], sample(label, rows, columns, 8))


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_glu"])
@pytest.mark.parametrize("rows", [[130, 0, 70], [5, 0, 17, 1]], ids=["many", "few"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_gradients_write_every_element(op, rows, top_k, nan_in_new_memory):
    with emulator("random", "random"), llmcore.backend("kernel"):
        check_sample(registry[op], sample("gradients", rows, 40, 72, top_k, gradients=True))


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_glu"])
@pytest.mark.parametrize("k", [192, 512, 1088, 1999])  # 1, 2, 4 parts, and rows that are not aligned
def test_sums_in_parts(op, k, nan_in_new_memory):
    with emulator(), llmcore.backend("kernel"):
        check_sample(registry[op], sample("parts", [0, 2, 0], 24, k, gradients=True))


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_glu"])
@pytest.mark.parametrize("shared", [99, 163])
def test_small_cards(op, shared, nan_in_new_memory):
    with emulator(shared_bytes=shared * 1024), llmcore.backend("kernel"):
        check_sample(registry[op], sample("small card", [140, 3, 150], 264, 136, gradients=True))


def test_no_bank_conflicts():
    before = llmcore._C.emulator_counters()
    for rows in ([130, 0, 70], [5, 0, 17]):
        for op in ("grouped_gemm", "grouped_glu"):
            with emulator(), llmcore.backend("kernel"):
                check_sample(registry[op], sample("conflicts", rows, 136, 136, gradients=True))
    after = llmcore._C.emulator_counters()
    done = {name: after[name] - before[name] for name in after}
    assert done["ldmatrix_matrices"] > 0
    assert done["ldmatrix_wavefronts"] == done["ldmatrix_matrices"]
