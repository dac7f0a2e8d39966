"""The public ops. Each has a CPU kernel (and a CUDA kernel where one is built), autograd, a fake kernel for
torch.compile, and a pure-torch reference of the same signature in `llmcore.reference`."""

from llmcore.ops.dyt import dyt
from llmcore.ops.glu import geglu, swiglu
from llmcore.ops.kv_cache_write import kv_cache_write
from llmcore.ops.layer_norm import layer_norm
from llmcore.ops.registry import BackendFallbackWarning, OpSpec, Sample, backend, explain, registry, support
from llmcore.ops.rms_norm import rms_norm
from llmcore.ops.rope import rope, rope_, rope_tables

__all__ = [
    "BackendFallbackWarning",
    "OpSpec",
    "Sample",
    "backend",
    "dyt",
    "explain",
    "geglu",
    "kv_cache_write",
    "layer_norm",
    "registry",
    "rms_norm",
    "rope",
    "rope_",
    "rope_tables",
    "support",
    "swiglu",
]
