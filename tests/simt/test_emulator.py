"""The emulator itself: known answers for every wrapper of csrc/cuda/ptx.cuh, and planted bugs that it must find
(tests/simt/programs). What each bug is found by stands in the tables at the end of tile_product.cu and block_sum.cu."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from tests.simt.build import program

SCHEDULES = ("round_robin", "random", "priorities")
COPIES = ("late", "early", "random")


@pytest.mark.parametrize("mode", list(itertools.product(SCHEDULES, COPIES)), ids="-".join)
def test_right_programs_pass_and_planted_bugs_are_found(mode):
    done = subprocess.run([program("emulator_test"), *mode], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
