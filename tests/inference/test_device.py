"""Names of devices, and what a machine without a GPU says."""

from __future__ import annotations

import pytest
import torch

from llmcore.inference.device import find_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CPU", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"--device is '{name}'; accepted: auto, cpu, cuda or cuda:N"):
        find_device(name, "--device")


def test_cpu_is_always_there():
    assert find_device("cpu") == torch.device("cpu")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert find_device("auto") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"device is 'cuda', but this torch \(.*\) has no CUDA; accepted: cpu"):
        find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device is 'cuda:3', but torch sees 1 CUDA device; accepted: cpu or cuda:N"):
        find_device("cuda:3")
