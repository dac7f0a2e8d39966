"""The emulator itself: known answers for every wrapper of csrc/cuda/ptx.cuh, and planted bugs that it must find
(tests/simt/programs). What each bug is found by stands in the tables at the end of tile_product.cu and block_sum.cu."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from tests.simt.build import program

HERE = Path(__file__).resolve().parent
SCHEDULES = ("round_robin", "random", "priorities")
COPIES = ("late", "early", "random")


@pytest.mark.parametrize("mode", list(itertools.product(SCHEDULES, COPIES)), ids="-".join)
def test_right_programs_pass_and_planted_bugs_are_found(mode):
    done = subprocess.run([program("emulator_test"), *mode], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_wrapper_has_a_known_answer():
    csrc = HERE.parents[1] / "csrc"
    on_device = (csrc / "cuda/ptx.cuh").read_text().split("#ifdef __CUDACC__")[-1].split("#else")[0]
    wrappers = set(re.findall(r"^PTX_DEVICE \w+ (\w+)\(", on_device, re.MULTILINE))
    assert {"mma", "ldmatrix_x4", "shfl_xor"} <= wrappers
    used = set(re.findall(r"\bptx::(\w+)", (HERE / "programs/known_answers.cu").read_text()))
    assert wrappers <= used, f"not in programs/known_answers.cu: {sorted(wrappers - used)}"
