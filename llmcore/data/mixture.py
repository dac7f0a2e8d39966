"""Several packed datasets as one stream, each row drawn from one of them by weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .packing import Batch, PackedDataset, check_matches, checked_count, collate, hash64


class Mixture:
    """An endless stream of batches whose rows come from `sources` in proportion to `weights`.

    Rows are equally long, so weights are shares of tokens. Row number i comes from a source chosen by a hash of
    (seed, i). Weights need not add up to 1. Raises ValueError for weights that aren't positive and finite, names that
    differ, or sources of different row_len or tokenizers.
    """

    def __init__(
        self,
        sources: Mapping[str, PackedDataset],
        weights: Mapping[str, float],
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if not sources or set(sources) != set(weights):
            raise ValueError(f"sources {sorted(sources)} and weights {sorted(weights)} must name the same datasets")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight of {name!r} must be positive and finite, not {weight}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {seed}")
        for label, values in (
            ("row_len", {name: source.row_len for name, source in sources.items()}),
            ("tokenizer", {name: source.dataset.meta["tokenizer"] for name, source in sources.items()}),
        ):
            if len(set(values.values())) > 1:
                raise ValueError(f"the sources of a mixture must share one {label}, not {values}")
        if len({id(source) for source in sources.values()}) < len(sources):
            raise ValueError("one PackedDataset cannot be two sources: they would share a cursor")
        self.sources = {name: sources[name] for name in sorted(sources)}  # the caller's order must not matter
        total = math.fsum(weights.values())
        self.weights = {name: weights[name] / total for name in self.sources}
        self.batch_size, self.seed = batch_size, seed
        self._row = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        names = list(self.sources)
        draws = hash64(self.seed, 0, np.arange(self._row, self._row + self.batch_size))
        shares = (draws >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        chosen = np.searchsorted(np.cumsum(list(self.weights.values()))[:-1], shares, side="right")
        cursors = {name: source.cursor for name, source in self.sources.items()}
        rows = []
        for name in (names[index] for index in chosen):
            row, cursors[name] = self.sources[name].read_row(cursors[name])
            rows.append(row)
        batch = collate(rows)
        for name, source in self.sources.items():
            source.cursor = cursors[name]
        self._row += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream and each of its sources stand, as plain JSON values."""
        return {
            "seed": self.seed,
            "weights": dict(self.weights),
            "row": self._row,
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. ValueError names what differs; then nothing has changed."""
        check_matches(state, self.state_dict(), ("seed", "weights"))
        row = checked_count(state, "row")
        states = state.get("sources")
        if not isinstance(states, Mapping) or set(states) != set(self.sources):
            raise ValueError(f"cursor: sources must be a mapping of {sorted(self.sources)}, not {states!r}")
        for name, source in self.sources.items():
            try:
                source.checked_cursor(states[name])
            except ValueError as error:
                raise ValueError(f"source {name!r}: {error}") from error
        for name, source in self.sources.items():
            source.load_state_dict(states[name])
        self._row = row
