"""Running a trained model: loading it, the engine on its paged cache, and text in and out."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.embed import TextEmbedder, load_embedder
from llmcore.inference.engine import Engine
from llmcore.inference.generate import NewToken, generate, stream
from llmcore.inference.language_model import Completion, GenerationDefaults, LanguageModel
from llmcore.inference.load import load, load_model
from llmcore.inference.params import SamplingParams
from llmcore.inference.perplexity import Perplexity
from llmcore.inference.seq2seq import generate_seq2seq
from llmcore.inference.sequence import Delta, Finish, RequestOutput, TokenLogprob
from llmcore.inference.stats import EngineStats

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "Finish",
    "GenerationDefaults",
    "LanguageModel",
    "NewToken",
    "PagedKVCache",
    "Perplexity",
    "RequestOutput",
    "SamplingParams",
    "TextEmbedder",
    "TokenLogprob",
    "generate",
    "generate_seq2seq",
    "load",
    "load_embedder",
    "load_model",
    "stream",
]
