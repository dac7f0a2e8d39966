from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from llmcore.data import TextFiles, Texts, TokenDataset, prepare
from llmcore.tokenizers import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return train_tokenizer([], kind="byte")


@pytest.fixture(scope="session")
def real_source() -> TextFiles:
    """Real text: some packages of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return TextFiles([folder / name for name in ("json", "logging", "asyncio", "email")], extensions=(".py",))


@pytest.fixture(scope="session")
def real_tokenizer(real_source) -> Tokenizer:
    return train_tokenizer((document.text for document in real_source), vocab_size=1000)


@pytest.fixture(scope="session")
def real_dataset(real_source, real_tokenizer, tmp_path_factory) -> TokenDataset:
    """The same as tokens, in several shards."""
    return prepare(real_source, real_tokenizer, tmp_path_factory.mktemp("real"), shard_tokens=50_000)


@pytest.fixture
def make_dataset(byte_tokenizer, tmp_path):
    """Byte tokens of given texts."""

    def make(texts: list[str], name: str = "dataset", **options) -> TokenDataset:
        return prepare(Texts(texts), byte_tokenizer, tmp_path / name, **options)

    return make
