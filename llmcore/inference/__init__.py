"""Running a trained model: loading it, the paged cache, sampling, batch generation, and text in and out."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.embed import TextEmbedder, load_embedder
from llmcore.inference.generate import NewToken, generate, stream
from llmcore.inference.language_model import Completion, GenerationDefaults, LanguageModel
from llmcore.inference.load import load, load_model
from llmcore.inference.perplexity import Perplexity
from llmcore.inference.seq2seq import generate_seq2seq

__all__ = [
    "Completion",
    "GenerationDefaults",
    "LanguageModel",
    "NewToken",
    "PagedKVCache",
    "Perplexity",
    "TextEmbedder",
    "generate",
    "generate_seq2seq",
    "load",
    "load_embedder",
    "load_model",
    "stream",
]
