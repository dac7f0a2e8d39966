"""Running a trained model: loading it, the paged cache, sampling, batch generation, and text in and out."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.generate import NewToken, generate, stream
from llmcore.inference.language_model import Completion, GenerationDefaults, LanguageModel
from llmcore.inference.load import load, load_model
from llmcore.inference.perplexity import Perplexity

__all__ = [
    "Completion",
    "GenerationDefaults",
    "LanguageModel",
    "NewToken",
    "PagedKVCache",
    "Perplexity",
    "generate",
    "load",
    "load_model",
    "stream",
]
