"""Pure-torch references: the same signatures as `llmcore.ops`, and what every kernel must compute.

They import torch only, are differentiable through torch's autograd, run in any floating dtype on any device, and are
written to be read; speed is not their business.
"""

from llmcore.reference.attention import attention, paged_attention
from llmcore.reference.losses import linear_cross_entropy
from llmcore.reference.moe import grouped_gemm, moe_combine, moe_dispatch, moe_route
from llmcore.reference.norms import rms_norm

__all__ = [
    "attention",
    "grouped_gemm",
    "linear_cross_entropy",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "paged_attention",
    "rms_norm",
]
