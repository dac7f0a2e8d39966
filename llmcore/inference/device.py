"""Which device a command runs on."""

from __future__ import annotations

import re

import torch

ACCEPTED = "auto, cpu, cuda or cuda:N"


def check_device_name(what: str, name: str) -> None:
    """Raises ValueError, naming ``what``, for a device name of no accepted form. Looks at no device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"{what} is {name!r}; accepted: {ACCEPTED}")


def find_device(name: str, what: str = "device") -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:N", or "auto": the first GPU where torch sees one, else the CPU.

    Raises:
        ValueError: naming ``what``, for another name or for a GPU that is not there.
    """
    check_device_name(what, name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ValueError(f"{what} is {name!r}, but this torch ({torch.__version__}) has no CUDA; accepted: cpu")
    index, count = torch.device("cuda" if name == "auto" else name).index or 0, torch.cuda.device_count()
    if index >= count:
        seen = f"{count} CUDA device{'s' * (count != 1)}"
        raise ValueError(f"{what} is {name!r}, but torch sees {seen}; accepted: cpu or cuda:N with N below {count}")
    return torch.device("cuda", index)
