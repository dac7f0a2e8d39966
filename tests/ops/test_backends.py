"""Choosing and explaining backends; the torch version check; instruction sets."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import llmcore
from llmcore import ops
from llmcore.ops.registry import _decisions, _kernel_refusal, has_kernel


def test_backend_override_and_explanation():
    x = torch.randn(2, 8)
    assert "kernel on cpu in float32" in llmcore.explain("rms_norm", x)
    assert "reference, because the cpu kernel of rms_norm serves float32" in llmcore.explain("rms_norm", x.double())
    with llmcore.backend("reference"):
        assert "reference, because of llmcore.backend" in llmcore.explain("rms_norm", x)
    with pytest.raises(ValueError, match="no op is called 'rms'; ops: adamw_, apply_penalties_, attention"):
        llmcore.explain("rms", x)
    with (
        pytest.raises(ValueError, match="backend 'fast': expected one of auto, kernel, reference"),
        llmcore.backend("fast"),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name there")
def test_the_bindings_find_functions_of_libraries_that_they_are_not_linked_with():
    """As current_stream finds torch's CUDA streams (csrc/bindings/common.cpp): Python loads torch outside the global
    scope, where neither libtorch_cuda nor this library of its Python side can be found without their names."""
    assert llmcore._C.has_loaded_symbol("libtorch_python.so", "initModule")
    assert not llmcore._C.has_loaded_symbol("libtorch_python.so", "no_such_function")
    assert not llmcore._C.has_loaded_symbol("no_such_library.so", "initModule")  # or the test above would prove nothing


def test_has_kernel_plans_without_a_warning(recwarn):
    x = torch.randn(2, 8)
    assert has_kernel("rms_norm", x)
    assert not has_kernel("rms_norm", x.to("meta"))
    with llmcore.backend("kernel"):
        assert not has_kernel("rms_norm", x.double())
    with llmcore.backend("reference"):
        assert not has_kernel("rms_norm", x)
    assert not recwarn.list


def test_kernel_backend_refuses_what_no_kernel_serves():
    with llmcore.backend("kernel"), pytest.raises(RuntimeError, match="not float64"):
        ops.rms_norm(torch.randn(2, 8).double(), torch.ones(8).double())


def test_falling_back_is_not_silent():
    _decisions.pop(("rms_norm", "meta", torch.float32), None)
    with pytest.warns(ops.BackendFallbackWarning, match="no meta kernel of rms_norm"):
        ops.rms_norm(torch.randn(2, 8, device="meta"), torch.ones(8, device="meta"))


def test_an_earlier_refusal_does_not_silence_the_fall_back():
    x, weight = torch.randn(2, 8, device="meta"), torch.ones(8, device="meta")
    _decisions.pop(("rms_norm", "meta", torch.float32), None)
    with llmcore.backend("kernel"), pytest.raises(RuntimeError, match="no meta kernel of rms_norm"):
        ops.rms_norm(x, weight)
    with pytest.warns(ops.BackendFallbackWarning, match="no meta kernel of rms_norm"):
        ops.rms_norm(x, weight)


def test_forward_mode_is_refused_by_kernels_and_served_by_the_reference():
    x, tangent = torch.randn(2, 8), torch.randn(2, 8)

    def f(x):
        return ops.rms_norm(x, torch.ones(8))

    with pytest.raises(NotImplementedError, match="rms_norm: kernels have no forward-mode gradient"):
        torch.func.jvp(f, (x,), (tangent,))
    with llmcore.backend("reference"):
        _, actual = torch.func.jvp(f, (x,), (tangent,))
        expected = (f(x + 1e-3 * tangent) - f(x - 1e-3 * tangent)) / 2e-3
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("built", "capability", "refusal"),
    [
        (
            "none (nvcc was not found)",
            (9, 0),
            "no CUDA kernels: none .nvcc was not found.*LLMCORE_CUDA=on",
        ),
        ("sm_80 sm_90a", (7, 5), "GPU .sm_75. is too old for the CUDA kernels, which need sm_80"),
        (
            "sm_90a",
            (8, 0),
            "for sm_90a, not for GPU .sm_80.; .*ARCHITECTURES=80 LLMCORE_CUDA=on pip install . builds",
        ),
        ("sm_90a", (10, 0), "not for GPU .sm_100."),
        ("sm_80 sm_90a", (8, 6), None),
        ("sm_80 sm_90a", (12, 0), None),
        ("sm_90a", (9, 0), None),
    ],
)
def test_cuda_kernels_are_refused_where_they_would_not_run(monkeypatch, built, capability, refusal):
    monkeypatch.setattr(llmcore._C, "build_info", lambda: {"cuda": built})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    text = _kernel_refusal("swiglu", torch.device("cuda"), torch.bfloat16)
    assert text is None if refusal is None else re.search(refusal, text)


def test_paged_attention_has_no_gradient():
    q = torch.randn(1, 2, 4, requires_grad=True)
    block, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = ops.paged_attention(q, torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), block, length)
    with pytest.raises(NotImplementedError, match="paged_attention has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("version", ["2.9.1", "2.14.0", "3.0.0+cpu", "1.13.1"])
def test_unsupported_torch_is_one_clear_sentence(version):
    with pytest.raises(
        ImportError, match=f"torch >= 2.10 and < 2.14, but torch {version.replace('+', '.')} is installed"
    ):
        llmcore._check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.12.1a0+git123"])
def test_supported_torch(version):
    llmcore._check_torch(version)


def test_instruction_set_from_the_environment(tmp_path):
    code = "import llmcore; print(llmcore.build_info()['active_cpu_isa'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                         env={"LLMCORE_CPU_ISA": "portable", "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert run.stdout.strip() == "portable"
    assert not llmcore._C.set_cpu_isa("avx9000")
