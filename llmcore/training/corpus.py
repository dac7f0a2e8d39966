"""From a recipe's sources to packed batches: readers, the held-out split, tokenised data on disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcore.data import (
    AnyFiles,
    Batch,
    Document,
    JsonLines,
    Mixture,
    PackedDataset,
    Parquet,
    Source,
    Split,
    TextFiles,
    TokenDataset,
    prepare,
    python_stdlib,
)
from llmcore.data.readers import cut, digest
from llmcore.tokenizers import Tokenizer, train_tokenizer
from llmcore.tokenizers.train import byte_alphabet
from llmcore.training.config import DataConfig, SourceConfig, TokenizerConfig

_FEW = 8  # expected held-out documents below which documents are cut: a split of fewer is a matter of luck


class Pieces(Source):
    """The documents of ``source``, each cut into pieces of at most ``characters``, at line ends where there are any."""

    def __init__(self, source: Source, characters: int) -> None:
        super().__init__()
        self.source, self.characters = source, characters

    def describe(self) -> str:
        return f"{self.source.describe()} in pieces of {self.characters} characters"

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), str(self.characters)])

    def _documents(self) -> Iterator[Document]:
        for document in self.source:
            self.skips = self.source.skips
            for number, piece in enumerate(cut(document.text, self.characters)):
                yield Document(piece, f"{document.source_id}#{number}")


def read_source(config: SourceConfig) -> Source:
    """The reader for one source, whole."""
    if config.path == "stdlib":
        return python_stdlib()
    path = os.path.expanduser(config.path)
    if config.format == "text":
        return TextFiles(path)
    reader = {"jsonl": JsonLines, "parquet": Parquet, "auto": AnyFiles}[config.format]
    return reader(path, text_field=config.text_field)


def cut_if_few(source: Source, validation_fraction: float) -> Source:
    """``source``, its documents cut into pieces when they are too few to hold a fair part of them out."""
    characters = 0
    for documents, document in enumerate(source, 1):
        characters += len(document.text)
        if documents * validation_fraction >= _FEW:
            return source
    return Pieces(source, max(100, int(characters * validation_fraction / (2 * _FEW))))


def get_tokenizer(config: TokenizerConfig, texts: Callable[[], Iterable[str]], folder: Path) -> Tokenizer:
    """The run's tokenizer: the one in ``folder``, else loaded or trained on ``texts()`` and saved there."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    if config.path:
        tokenizer = Tokenizer.load(os.path.expanduser(config.path))
    else:
        size = None if config.kind == "byte" else config.vocab_size
        tokenizer = train_tokenizer(texts(), kind=config.kind, vocab_size=size)
    tokenizer.save(folder)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor | None:
    """The bytes of text each token stands for, (vocab,) int64; special tokens 0. None unless it works on bytes."""
    alphabet = byte_alphabet()
    if any(tokenizer.token_to_id(character) is None for character in alphabet):
        return None
    special = set(tokenizer.special_tokens.values())
    tokens = [tokenizer.id_to_token(i) if i not in special else None for i in range(tokenizer.vocab_size)]
    return torch.tensor([len(token) if token else 0 for token in tokens], dtype=torch.int64)


@dataclass
class Corpus:
    """``loader`` gives training batches without end, ``eval_batches()`` the held-out ones, the same every time."""

    tokenizer: Tokenizer
    loader: Any
    eval_batches: Callable[[], Iterator[Batch]]
    train_sets: dict[str, TokenDataset]
    validation_sets: dict[str, TokenDataset]


def build_corpus(
    data: DataConfig, tokenizer: TokenizerConfig, run_dir: Path, *, seed: int, say: Callable[[str], None]
) -> Corpus:
    """Train the tokenizer and tokenise the corpus; what an earlier call finished in the run folder is used again.

    The tokenizer sees no held-out document. Documents are held out by the hash of their text, so a copy of one never
    stays in the training part.
    """
    folder = Path(os.path.expanduser(data.folder)) if data.folder else run_dir / "data"
    names = [f"{index}-{Path(source.path).name}" for index, source in enumerate(data.sources)]
    sources: dict[str, Source] = {}

    def part(name: str, part: str) -> Source:
        if name not in sources:
            source = read_source(data.sources[names.index(name)])
            sources[name] = cut_if_few(source, data.validation_fraction)
        return Split(sources[name], part, data.validation_fraction)

    def texts() -> Iterator[str]:
        say(f"training a {tokenizer.kind} tokenizer of {tokenizer.vocab_size} tokens")
        for name in names:
            yield from (document.text for document in part(name, "train"))

    encoder = get_tokenizer(tokenizer, texts, run_dir / "tokenizer")
    sets: dict[str, dict[str, TokenDataset]] = {"train": {}, "validation": {}}
    for which, opened in sets.items():
        for name in names:
            place = folder / f"{name}-{which}"
            if not data.folder and (place / "meta.json").is_file():  # of this very run: the source may be gone by now
                opened[name] = TokenDataset(place, encoder)
                continue
            say(f"tokenising {data.sources[names.index(name)].path} ({which})")
            opened[name] = prepare(part(name, which), encoder, place)
            if which == "train" and opened[name].skips.total:  # both parts read, and leave out, the same
                say(f"{data.sources[names.index(name)].path}: {opened[name].skips}")
    rows = {"row_len": data.row_len, "batch_size": data.batch_rows, "seed": seed}
    packed = {name: PackedDataset(opened, **rows) for name, opened in sets["train"].items()}
    if len(packed) == 1:
        loader: Any = next(iter(packed.values()))
    else:
        weights = {name: source.weight for name, source in zip(names, data.sources)}
        loader = Mixture(packed, weights, batch_size=data.batch_rows, seed=seed)
    held_out = [PackedDataset(opened, **rows) for opened in sets["validation"].values()]
    # Of several sources each gives its first batches, in turn, until there are enough.
    limit = data.eval_batches or None

    def eval_batches() -> Iterator[Batch]:
        turns = itertools.zip_longest(*(source.eval_batches() for source in held_out))
        return itertools.islice((batch for turn in turns for batch in turn if batch is not None), limit)

    return Corpus(encoder, loader, eval_batches, sets["train"], sets["validation"])
