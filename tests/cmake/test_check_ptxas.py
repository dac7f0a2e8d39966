"""The gate on what CUDA kernels take of a GPU (cmake/check_ptxas.py)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "cmake" / "check_ptxas.py"


def load():
    spec = importlib.util.spec_from_file_location("check_ptxas", SCRIPT)
    module = sys.modules["check_ptxas"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_ptxas = load()

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'good' for 'sm_80'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'spilling' for 'sm_90a'
ptxas info    : Function properties for spilling
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'waits'
ptxas info    : Compiling entry function 'local' for 'sm_90a'
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_report_is_read():
    good, spilling, local = check_ptxas.parse(REPORT)
    assert (good.name, good.architecture, good.registers, good.static_shared) == ("good", "sm_80", 40, 512)
    assert good.faults() == []
    assert spilling.registers == 255
    assert spilling.faults()[0] == "spills 20 bytes"
    assert "C7510" in spilling.faults()[1]
    assert local.faults() == ["keeps 32 bytes in local memory"]


def test_exceptions_cover_faults_of_their_file_and_must_be_needed():
    kernels = check_ptxas.parse(REPORT)
    covering = {("a.cu", "spilling sm_90a"): "reason", ("a.cu", "^local "): "reason"}
    assert check_ptxas.check("a.cu", kernels, covering) == []
    assert len(check_ptxas.check("b.cu", kernels, covering)) == 2
    (idle,) = check_ptxas.check("a.cu", kernels, {**covering, ("a.cu", "^good "): "reason"})
    assert "'^good ' of check_ptxas.py is not needed" in idle


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_spilling_kernels_fail_the_compilation(tmp_path):
    output = tmp_path / "spills.o"
    command = ["nvcc", "-arch=sm_80", "-c", str(HERE / "spills.cu"), "-o", str(output)]
    done = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills on sm_80: spills " in done.stderr
    assert "indexes on sm_80: keeps 128 bytes in local memory" in done.stderr
    assert "doubles" in done.stdout  # it is in the table,
    assert "doubles" not in done.stderr  # but it is no fault
    assert not output.exists()
