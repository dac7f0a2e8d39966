"""Pure-torch references: the same signatures as `llmcore.ops`, and what every kernel must compute.

They import torch only, are differentiable through torch's autograd, run in any floating dtype on any device, and are
written to be read; speed is not their business.
"""

from llmcore.reference.attention import attention, paged_attention
from llmcore.reference.glu import geglu, swiglu
from llmcore.reference.kv_cache import LARGEST_ELEMENT, kv_cache_write, quantise
from llmcore.reference.linear import linear
from llmcore.reference.losses import linear_cross_entropy
from llmcore.reference.moe import grouped_gemm, grouped_glu, moe_combine, moe_dispatch, moe_route, moe_sort
from llmcore.reference.norms import dyt, layer_norm, rms_norm
from llmcore.reference.optim import adamw_, global_norm
from llmcore.reference.qk_norm_rope import qk_norm_rope, qk_norm_rope_cache_write
from llmcore.reference.quantized import (
    dequantize,
    pack_quantized,
    quantize,
    quantize_activations,
    quantized_embedding,
    quantized_grouped_linear,
    quantized_linear,
    quantized_linear_,
    unpack_quantized,
)
from llmcore.reference.rope import rope, rope_
from llmcore.reference.sampling import apply_penalties_, sample, sampling_probabilities

__all__ = [
    "LARGEST_ELEMENT",
    "adamw_",
    "apply_penalties_",
    "attention",
    "dequantize",
    "dyt",
    "geglu",
    "global_norm",
    "grouped_gemm",
    "grouped_glu",
    "kv_cache_write",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "moe_sort",
    "pack_quantized",
    "paged_attention",
    "qk_norm_rope",
    "qk_norm_rope_cache_write",
    "quantise",
    "quantize",
    "quantize_activations",
    "quantized_embedding",
    "quantized_grouped_linear",
    "quantized_linear",
    "quantized_linear_",
    "rms_norm",
    "rope",
    "rope_",
    "sample",
    "sampling_probabilities",
    "swiglu",
    "unpack_quantized",
]
