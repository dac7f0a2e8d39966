"""Data for pretraining: readers, held-out splits, token shards, packing, mixtures."""

from .mixture import Mixture
from .packing import Batch, PackedDataset
from .readers import AnyFiles, Document, JsonLines, Parquet, SkipReport, Source, TextFiles, Texts, python_stdlib
from .shards import TokenDataset, prepare
from .splits import Split, part_of
from .word_problems import WordProblem, word_problems

__all__ = [
    "AnyFiles",
    "Batch",
    "Document",
    "JsonLines",
    "Mixture",
    "PackedDataset",
    "Parquet",
    "SkipReport",
    "Source",
    "Split",
    "TextFiles",
    "Texts",
    "TokenDataset",
    "WordProblem",
    "part_of",
    "prepare",
    "python_stdlib",
    "word_problems",
]
