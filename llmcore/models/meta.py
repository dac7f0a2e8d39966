"""A model without memory, for weights that are about to come from a file."""

from __future__ import annotations

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from llmcore.models.build import Model, build_model
from llmcore.models.config import ModelConfig

_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)


class _WithoutDraws(TorchFunctionMode):
    """Leaves out random initial weights: on the meta device they cost nothing but torch's import of its compiler,
    which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def meta_model(config: ModelConfig, num_tensors: int) -> Model:
    """The model on the meta device: no memory for sizes that a file's tensors don't have.

    Raises:
        ValueError: when it has more layers than the file has tensors.
    """
    for name in ("num_layers", "encoder_layers", "mtp_layers"):
        if getattr(config, name) > num_tensors:
            raise ValueError(f"{name} is {getattr(config, name)}; the file has {num_tensors} tensors")
    with torch.device("meta"), _WithoutDraws():
        return build_model(config)
