"""Packing documents into rows of fixed length, without a token or a target lost and without crossing documents.

A row is filled with documents one behind the other. What doesn't fit goes on in the next row as a new piece: it sees
nothing of the earlier piece (positions begin at 0), but the earlier piece's last token still predicts its first.

What is shuffled is spans: documents cut every row_len tokens. With whole documents, one longer than a batch would fill
the batch, and an optimizer step would follow the gradient of a single document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .shards import TokenDataset

IGNORE = -100  # the target of a token that predicts nothing


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, flattened to one axis of length rows * row_len.

    tokens: (rows * row_len,) int64.
    targets: (rows * row_len,) int64, the next token of the same document; -100 at a document's end and for padding.
    positions: (rows * row_len,) int64, from 0 in each piece.
    cu_seqlens: (num_pieces + 1,) int32, where pieces begin and the last ends. Padding is a piece of its own.
    max_seqlen: tokens in the longest piece. num_targets: targets that aren't -100. rows: number of rows.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_targets: int
    rows: int

    def to(self, device: torch.device | str) -> Batch:
        names = ("tokens", "targets", "positions", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Row:
    """One packed row: tokens and targets (row_len,) int64, and the lengths of its pieces."""

    tokens: np.ndarray
    targets: np.ndarray
    pieces: list[int]


@dataclass(frozen=True)
class Cursor:
    """The next token: `offset` in span number `span` of the order of `epoch`."""

    epoch: int = 0
    span: int = 0
    offset: int = 0


class PackedDataset:
    """An endless stream of batches over the documents of a `TokenDataset`, and a finite one for evaluation.

    Each epoch goes through all spans once, in an order that depends on `seed` and the epoch alone (in stored order with
    `shuffle=False`); the row that an epoch's last span leaves unfilled goes on with the next epoch.
    `state_dict()` is where the stream stands.
    """

    def __init__(
        self, dataset: TokenDataset, *, row_len: int, batch_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        for name, value in (("row_len", row_len), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {seed}")
        self.dataset, self.row_len, self.batch_size, self.seed, self.shuffle = (
            dataset,
            row_len,
            batch_size,
            seed,
            shuffle,
        )
        self.cursor = Cursor()
        spans = -(-dataset.lengths() // row_len)
        self._first_span = np.concatenate([[0], np.cumsum(spans)])  # of each document; the last entry is their number
        self._order_epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """Epochs gone through: 0 while the first is under way."""
        return self.cursor.epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows, cursor = [], self.cursor
        for _ in range(self.batch_size):
            row, cursor = self.read_row(cursor)
            rows.append(row)
        batch = collate(rows)
        self.cursor = cursor  # only now: a batch that was interrupted half-way is given again, whole
        return batch

    def read_row(self, cursor: Cursor) -> tuple[Row, Cursor]:
        """The full row that begins at `cursor`, and where the next one begins. Moves nothing."""
        pieces: list[tuple[np.ndarray, int]] = []
        free = self.row_len
        while free:
            document, start, end = self._span(cursor)
            start += cursor.offset
            length = min(free, end - start)
            # One token more than the piece, when there is one: the target of the piece's last token.
            pieces.append((document[start : start + length + 1], length))
            free -= length
            if start + length < end:
                cursor = replace(cursor, offset=cursor.offset + length)
            elif cursor.span + 1 < self._first_span[-1]:
                cursor = Cursor(cursor.epoch, cursor.span + 1)
            else:
                cursor = Cursor(cursor.epoch + 1)
        return self._fill(pieces), cursor

    def eval_batches(self) -> Iterator[Batch]:
        """Every token of every document once, in stored order, apart from the stream.

        The last row is padded (token 0, target -100); the last batch may have fewer rows than the others.
        """
        pieces: list[tuple[np.ndarray, int]] = []
        free, rows = self.row_len, []
        for index in range(len(self.dataset)):
            document, offset = self.dataset.document(index), 0
            while offset < len(document):
                length = min(free, len(document) - offset)
                pieces.append((document[offset : offset + length + 1], length))
                offset, free = offset + length, free - length
                if not free:
                    rows.append(self._fill(pieces))
                    pieces, free = [], self.row_len
                if len(rows) == self.batch_size:
                    yield collate(rows)
                    rows = []
        if pieces:
            rows.append(self._fill(pieces))
        if rows:
            yield collate(rows)

    def _span(self, cursor: Cursor) -> tuple[np.ndarray, int, int]:
        """The document that the cursor's span is of, and where in it the span begins and ends."""
        index = cursor.span
        if self.shuffle:
            if cursor.epoch != self._order_epoch:
                self._order = epoch_order(int(self._first_span[-1]), self.seed, cursor.epoch)
                self._order_epoch = cursor.epoch
            index = int(self._order[index])
        number = int(np.searchsorted(self._first_span, index, side="right")) - 1
        document = self.dataset.document(number)
        start = (index - int(self._first_span[number])) * self.row_len
        return document, start, min(start + self.row_len, len(document))

    def _fill(self, pieces: list[tuple[np.ndarray, int]]) -> Row:
        tokens = np.zeros(self.row_len, dtype=np.int64)
        targets = np.full(self.row_len, IGNORE, dtype=np.int64)
        at = 0
        for piece, length in pieces:
            tokens[at : at + length] = piece[:length]
            targets[at : at + len(piece) - 1] = piece[1:]
            at += length
        # A bit flipped on disk would else surface as an index fault deep inside the model.
        if max(tokens.max(), targets.max()) >= self.dataset.vocab_size:
            raise ValueError(
                f"{self.dataset.folder} holds token {max(tokens.max(), targets.max())} outside its vocabulary of "
                f"{self.dataset.vocab_size}: a shard is damaged (see TokenDataset.verify)"
            )
        lengths = [length for _, length in pieces]
        return Row(tokens, targets, [*lengths, self.row_len - at] if at < self.row_len else lengths)

    # ---- the cursor

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values. It doesn't depend on batch_size, which may change."""
        return {
            "dataset": self.dataset.content_hash,
            "row_len": self.row_len,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.cursor.epoch,
            "span": self.cursor.span,
            "offset": self.cursor.offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. ValueError if it is of another dataset, row_len, seed or shuffle."""
        self.cursor = self.checked_cursor(state)

    def checked_cursor(self, state: Mapping[str, Any]) -> Cursor:
        """The cursor in `state`, or ValueError naming what doesn't fit. Changes nothing."""
        check_matches(state, self.state_dict(), ("dataset", "row_len", "seed", "shuffle"))
        cursor = Cursor(*(checked_count(state, name) for name in ("epoch", "span", "offset")))
        if cursor.span >= self._first_span[-1]:
            raise ValueError(f"cursor: span {cursor.span} of a dataset of {self._first_span[-1]} spans")
        _, start, end = self._span(cursor)
        if cursor.offset >= end - start:
            raise ValueError(f"cursor: offset {cursor.offset} in a span of {end - start} tokens")
        return cursor


def collate(rows: list[Row]) -> Batch:
    """Rows of equal length as one `Batch`."""
    lengths = np.array([length for row in rows for length in row.pieces], dtype=np.int64)
    ends = np.cumsum(lengths)
    targets = np.concatenate([row.targets for row in rows])
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return Batch(
        tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_targets=int((targets != IGNORE).sum()),
        rows=len(rows),
    )


def hash64(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 per index: SplitMix64 (Steele, Lea & Flood 2014) from a state made of seed and stream.

    Written out because numpy does not promise the same shuffles in another release, and a cursor must outlive one.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    state = mix(mix(np.array([seed], dtype=np.uint64) + golden) + np.array([stream], dtype=np.uint64) + golden)
    return mix(state + (index.astype(np.uint64) + np.uint64(1)) * golden)


def epoch_order(spans: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(spans), int64, the same on every machine."""
    return np.argsort(hash64(seed, epoch, np.arange(spans)), kind="stable")


def check_matches(state: Mapping[str, Any], own: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """ValueError naming the first of `names` whose value in the loaded cursor is not this loader's own."""
    for name in names:
        if name not in state:
            raise ValueError(f"cursor has no {name!r}; it holds {sorted(state)}")
        if state[name] != own[name]:
            raise ValueError(f"cursor is of another {name}: {state[name]!r}, here {own[name]!r}")


def checked_count(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"cursor: {name} must be a whole number in [0, 2**63), not {value!r}")
    return value
