from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from llmcore.tokenizers import train_tokenizer

VOCAB_SIZE = {"bpe": 1024, "unigram": 600, "word": 1024, "byte": None}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real text: about half a megabyte of the standard library's sources."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for name in ("json", "logging", "asyncio") for file in sorted((folder / name).glob("*.py"))]
    return [file.read_text(encoding="utf-8") for file in files]


@pytest.fixture(scope="session")
def trained(texts):
    """One tokenizer of each kind, by kind."""
    return {kind: train_tokenizer(texts, kind=kind, vocab_size=size) for kind, size in VOCAB_SIZE.items()}
