"""Held-out documents by the hash of their text: the same split on every machine, whatever the order or file names."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from .readers import Document, Source, digest

PARTS = ("train", "validation")


def part_of(text: str, validation_fraction: float, salt: str = "") -> str:
    """ "validation" for about `validation_fraction` of all distinct texts, else "train". Copies go together."""
    key = blake2b(salt.encode("utf-8"), digest_size=16).digest()
    value = int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8, key=key).digest(), "big")
    return "validation" if value < validation_fraction * 2**64 else "train"


class Split(Source):
    """The `part` ("train" or "validation") of a source. Another `salt` gives another split.

    Raises ValueError unless 0 < validation_fraction < 1, and, when read, if no document falls in the part.
    """

    def __init__(self, source: Source, part: str, validation_fraction: float, salt: str = "") -> None:
        super().__init__()
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
        self.source, self.part, self.fraction, self.salt = source, part, validation_fraction, salt

    def describe(self) -> str:
        return f"the {self.part} part (validation_fraction {self.fraction}) of {self.source.describe()}"

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), self.part, repr(self.fraction), self.salt])

    def _documents(self) -> Iterator[Document]:
        for document in self.source:
            self.skips = self.source.skips  # what the source left out; the other part is no skip
            if part_of(document.text, self.fraction, self.salt) == self.part:
                yield document
