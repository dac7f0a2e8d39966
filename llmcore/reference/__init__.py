"""Pure-torch references: the same signatures as `llmcore.ops`, and what every kernel must compute.

They import torch only, are differentiable through torch's autograd, run in any floating dtype on any device, and are
written to be read; speed is not their business.
"""

from llmcore.reference.attention import attention, paged_attention
from llmcore.reference.glu import geglu, swiglu
from llmcore.reference.kv_cache import kv_cache_write
from llmcore.reference.losses import linear_cross_entropy
from llmcore.reference.moe import grouped_gemm, grouped_glu, moe_combine, moe_dispatch, moe_route
from llmcore.reference.norms import dyt, layer_norm, rms_norm
from llmcore.reference.rope import rope, rope_

__all__ = [
    "attention",
    "dyt",
    "geglu",
    "grouped_gemm",
    "grouped_glu",
    "kv_cache_write",
    "layer_norm",
    "linear_cross_entropy",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_",
    "swiglu",
]
