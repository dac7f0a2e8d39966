"""Errors in data that CUDA kernels find while they run, where a check beforehand would make the host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from llmcore.ops.registry import cuda_refusal


class Record(NamedTuple):
    """What kernels found of one kind: how often, and the lowest index with the value there. `accepted` is for the kind
    to give meaning to."""

    count: int
    index: int
    value: int
    accepted: tuple[int, int, int]

    @property
    def value_text(self) -> str:
        """Values are kept to 32 bits."""
        return f"{self.value}{' or more' if self.value == 2**31 - 1 else ' or less' if self.value == -(2**31) else ''}"


def _target_outside_vocabulary(r: Record) -> str:
    low, high, ignore_index = r.accepted
    many = f"{r.count} targets lie" if r.count > 1 else "1 target lies"
    return (
        f"linear_cross_entropy: {many} outside the vocabulary, the first is targets[{r.index}] = {r.value_text}; "
        f"accepted: {low} to {high}, or {ignore_index} to ignore the token"
    )


# In the order of DeviceError in csrc/include/llmcore/device_errors.h.
MESSAGES: tuple[Callable[[Record], str], ...] = (_target_outside_vocabulary,)


def check_device_errors(device: torch.device | str | int | None = None) -> None:
    """Raises what kernels found wrong in their data on `device` since the last call, and forgets it.

    On the CPU ops raise such errors themselves. A CUDA kernel computes something harmless instead (NaN, where there is
    room for it) and counts the error in a record of its device, which this reads: it waits for the current stream.
    Several calls of an op share a record: the index is the lowest one in any of them.

    Args:
        device: a CUDA device (default: the current one). On others there is nothing to find.

    Raises:
        RuntimeError: naming op, number of errors, the first one and what is accepted.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and cuda_refusal(device):
        return  # no kernel of this build has run there
    records = torch.empty(len(MESSAGES), 6, dtype=torch.int64, device=device)
    torch.ops.llmcore.take_device_errors_(records)
    found = [
        message(Record(count, index, value, tuple(accepted)))
        for message, (count, index, value, *accepted) in zip(MESSAGES, records.tolist())
        if count
    ]
    if found:
        raise RuntimeError("\n".join(found))
