"""Running a trained model: the paged cache, sampling and batch generation."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.generate import generate

__all__ = ["PagedKVCache", "generate"]
