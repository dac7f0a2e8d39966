"""llmcore: large language models on hand-written kernels that can be read."""

from __future__ import annotations

import torch

__version__ = "0.1.0"


def _check_torch(version: str) -> None:
    """The stable ABI of torch 2.10 is what the extension is built against; newer releases than tested may work."""
    release = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2])
    if not (2, 10) <= release < (2, 14):
        raise ImportError(f"llmcore is tested with torch >= 2.10 and < 2.14, but torch {version} is installed")


_check_torch(torch.__version__)

try:
    from llmcore import _C
except ImportError as error:
    raise ImportError(
        f"llmcore's compiled extension could not be loaded ({error}); build it with `pip install .` in the repository, "
        "or run from outside the source folder to import the installed package"
    ) from error

from llmcore import ops  # noqa: E402
from llmcore.ops import backend, explain  # noqa: E402


def build_info() -> dict[str, object]:
    """What the extension was built for, and what of it runs here."""
    return {
        **_C.build_info(),
        "version": __version__,
        "cpu_isas": list(_C.cpu_isas()),
        "active_cpu_isa": _C.active_cpu_isa(),
    }


def load(source, *, dtype=None, device="cpu", quantize=None):
    """A model with its tokenizer, ready to use: see `llmcore.inference.load`."""
    from llmcore.inference import load  # here: whoever wants the kernels alone needs no tokenizers

    return load(source, dtype=dtype, device=device, quantize=quantize)


__all__ = ["__version__", "backend", "build_info", "explain", "load", "ops"]
