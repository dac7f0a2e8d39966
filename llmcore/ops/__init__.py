"""The public ops. Each has a CPU kernel (and a CUDA kernel where one is built), autograd, a fake kernel for
torch.compile, and a pure-torch reference of the same signature in `llmcore.reference`."""

from llmcore.ops.adamw import adamw_
from llmcore.ops.attention import attention, paged_attention
from llmcore.ops.block_mask import BlockMask
from llmcore.ops.device_errors import check_device_errors
from llmcore.ops.dyt import dyt
from llmcore.ops.global_norm import global_norm
from llmcore.ops.glu import geglu, swiglu
from llmcore.ops.grouped_gemm import grouped_gemm
from llmcore.ops.grouped_glu import grouped_glu
from llmcore.ops.kv_cache_write import kv_cache_write
from llmcore.ops.layer_norm import layer_norm
from llmcore.ops.linear import linear
from llmcore.ops.linear_cross_entropy import linear_cross_entropy
from llmcore.ops.moe_permute import moe_combine, moe_dispatch, moe_sort
from llmcore.ops.moe_route import Routing, moe_route
from llmcore.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_cache_write
from llmcore.ops.quantized_grouped_linear import pack_experts, quantized_grouped_linear
from llmcore.ops.quantized_linear import pack_quantized, quantized_embedding, quantized_linear, quantized_linear_
from llmcore.ops.recompute import recompute_activations
from llmcore.ops.registry import BackendFallbackWarning, OpSpec, Sample, backend, explain, registry, support
from llmcore.ops.rms_norm import rms_norm
from llmcore.ops.rope import rope, rope_, rope_tables
from llmcore.ops.rope_scaling import RopeScaling
from llmcore.ops.sample import apply_penalties_, sample, sampling_probabilities
from llmcore.reference import dequantize

__all__ = [
    "BackendFallbackWarning",
    "BlockMask",
    "OpSpec",
    "RopeScaling",
    "Routing",
    "Sample",
    "adamw_",
    "apply_penalties_",
    "attention",
    "backend",
    "check_device_errors",
    "dequantize",
    "dyt",
    "explain",
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
    "pack_experts",
    "pack_quantized",
    "paged_attention",
    "qk_norm_rope",
    "qk_norm_rope_cache_write",
    "quantized_embedding",
    "quantized_grouped_linear",
    "quantized_linear",
    "quantized_linear_",
    "recompute_activations",
    "registry",
    "rms_norm",
    "rope",
    "rope_",
    "rope_tables",
    "sample",
    "sampling_probabilities",
    "support",
    "swiglu",
]
