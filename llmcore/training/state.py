"""The parts of a run's state that are neither model, optimizer nor data: random generators, signals, versions."""

from __future__ import annotations

import os
import platform
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators as JSON values; torch's bytes are hexadecimal."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [s.numpy().tobytes().hex() for s in cuda],
    }


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave. GPU generators are restored for the devices that are there."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(text), device)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators. ``seed`` is from 0 to 2**32 - 1 (numpy's range)."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def has_native_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 in hardware; elsewhere bf16 is emulated and slower than fp32.

    On a CPU: AVX512-BF16, AMX or the Arm BF16 extension, as Linux reports them; other systems count as without.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = {f for line in text.splitlines() if line.lower().startswith(("flags", "features")) for f in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``fp32``, ``bf16`` or ``auto`` (bf16 where it is native, else fp32)."""
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets :attr:`signal`; the second interrupts at once.

    Signal handlers belong to the main thread: entered in another one, this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # os.write: print may be in the middle of a buffer when the signal lands
        os.write(2, b"\nstopping: finishing this step and saving (once more to abort at once)\n")

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
