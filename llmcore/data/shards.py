"""A tokenised corpus on disk: flat token files that are memory-mapped, never loaded.

A folder holds `meta.json` and shards. A shard is `NAME.bin` (little-endian uint16 token ids, uint32 for vocabularies
above 65536, every document ending in EOS) and `NAME.npy` (int64 offsets of its documents, one more than documents).
`meta.json` is written last: with it the data set exists, without it nothing does, so a kill at any moment leaves the
old data set or the new one.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from llmcore.tokenizers import Tokenizer
from llmcore.tokenizers._atomic import write_atomic

from .readers import Document, SkipReport, Source, digest

FORMAT = "llmcore tokens 1"
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 256, 1 << 20  # tokenised at once, in threads: bounds the memory
_OURS = re.compile(r"[0-9a-f]{16}-(\d{5}\.(bin|npy)|progress\.json)(\.tmp)?")


class TokenDataset:
    """A folder written by `prepare`, open for reading. `len()` is the number of documents.

    Opening checks that every file is there in full size; `verify()` reads it all and compares checksums. Raises
    FileNotFoundError without `meta.json`, else ValueError for a truncated or foreign file, or if `tokenizer` is given
    and isn't the one the data was made with.
    """

    def __init__(self, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.content_hash: str = self.meta["content_hash"]
        self.num_tokens: int = self.meta["tokens"]
        self.vocab_size: int = self.meta["vocab_size"]
        if tokenizer is not None and tokenizer.fingerprint != self.meta["tokenizer"]:
            raise ValueError(
                f"{self.folder} was tokenised by tokenizer {self.meta['tokenizer']}, not by {tokenizer.fingerprint}"
            )
        self._tokens: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        dtype = np.dtype(self.meta["dtype"])
        for shard in self.meta["shards"]:
            self._tokens.append(_map_tokens(self.folder / f"{shard['name']}.bin", dtype, shard["tokens"]))
            self._offsets.append(_map_offsets(self.folder / f"{shard['name']}.npy", shard))
        self._first_document = np.cumsum([0] + [shard["documents"] for shard in self.meta["shards"]])

    def __len__(self) -> int:
        return int(self._first_document[-1])

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.folder)!r}, documents={len(self)}, tokens={self.num_tokens})"

    @property
    def skips(self) -> SkipReport:
        """What the readers left out when the data was made."""
        return SkipReport(**self.meta["skips"])

    def lengths(self) -> np.ndarray:
        """The tokens of each document, (documents,) int64."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, EOS last: a read-only view of the file, (length,) uint16 or uint32."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        local = index - int(self._first_document[shard])
        start, end = self._offsets[shard][local : local + 2]
        return self._tokens[shard][start:end]

    def verify(self) -> None:
        """Compare the checksum of every file; ValueError names the first that differs."""
        for shard in self.meta["shards"]:
            for suffix in ("bin", "npy"):
                path = self.folder / f"{shard['name']}.{suffix}"
                if _checksum(path) != shard.get(f"{suffix}_blake2b"):
                    raise ValueError(f"{path} is damaged: its checksum is not the one in meta.json")


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    add_bos: bool = False,
    shard_tokens: int = 100_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> TokenDataset:
    """Tokenise `source` into `out_dir`, streaming, and open the result.

    Every document gets EOS behind it (and BOS before it with `add_bos`). A second call with the same source, tokenizer
    and options reuses what is there; after an interrupted one it goes on from the last whole shard; with other inputs
    it replaces the data set when it is done. One process works on a folder at a time, others wait.
    `progress(documents, tokens)` is called now and then. Raises ValueError if the tokenizer lacks EOS (or BOS) or the
    source holds no documents.
    """
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no eos_token, which must end every document")
    if add_bos and tokenizer.bos_id is None:
        raise ValueError("add_bos needs a tokenizer with a bos_token")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    out_dir = Path(out_dir)
    parts = [FORMAT, source.fingerprint(), tokenizer.fingerprint, str(add_bos), str(shard_tokens)]
    fingerprint = digest(parts)
    if finished := _finished(out_dir, tokenizer, fingerprint):  # before the lock: the folder may be read-only
        return finished
    out_dir.mkdir(parents=True, exist_ok=True)
    with _only_process(out_dir):
        if finished := _finished(out_dir, tokenizer, fingerprint):
            return finished
        state = _write_shards(source, tokenizer, out_dir, fingerprint[:16], add_bos, shard_tokens, progress)
        meta = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "content_hash": digest([tokenizer.fingerprint, *(shard["bin_blake2b"] for shard in state["shards"])]),
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "dtype": _token_dtype(tokenizer.vocab_size).str,
            "add_bos": add_bos,
            "documents": sum(shard["documents"] for shard in state["shards"]),
            "tokens": sum(shard["tokens"] for shard in state["shards"]),
            "text_bytes": state["text_bytes"],
            "skips": source.skips.as_dict(),
            "shards": state["shards"],
        }
        write_atomic(out_dir / "meta.json", json.dumps(meta, indent=1))
        keep = {f"{shard['name']}.{suffix}" for shard in state["shards"] for suffix in ("bin", "npy")}
        for path in list(out_dir.iterdir()):
            if _OURS.fullmatch(path.name) and path.name not in keep:
                path.unlink()
    return TokenDataset(out_dir, tokenizer)


def _finished(folder: Path, tokenizer: Tokenizer, fingerprint: str) -> TokenDataset | None:
    """The data set in `folder` if it is whole and of these inputs."""
    try:
        dataset = TokenDataset(folder, tokenizer)
    except (FileNotFoundError, ValueError):  # none there, damaged, or made with another tokenizer
        return None
    return dataset if dataset.meta["fingerprint"] == fingerprint else None


def _write_shards(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: Path,
    prefix: str,
    add_bos: bool,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """{"shards": [...], "text_bytes": int} of the whole source, after what an interrupted call already wrote."""
    progress_file = out_dir / f"{prefix}-progress.json"
    state: dict[str, Any] = _read_progress(progress_file, out_dir, _token_dtype(tokenizer.vocab_size))
    done = sum(shard["documents"] for shard in state["shards"])
    tokens = sum(shard["tokens"] for shard in state["shards"])
    writer: _ShardWriter | None = None

    def close() -> None:
        nonlocal writer
        if writer:
            state["shards"].append(writer.close())
            writer = None
            write_atomic(progress_file, json.dumps(state))

    for group in _groups(source, skip=done):
        encoded = tokenizer.encode_batch([document.text for document in group], add_bos=add_bos, add_eos=True)
        for document, ids in zip(group, encoded):
            if writer is None:
                writer = _ShardWriter(out_dir, f"{prefix}-{len(state['shards']):05d}", tokenizer)
            writer.add(ids)
            state["text_bytes"] += len(document.text.encode("utf-8"))
            done, tokens = done + 1, tokens + len(ids)
            if writer.tokens >= shard_tokens:
                close()
        if progress:
            progress(done, tokens)
    close()
    return state


class _ShardWriter:
    """One shard in the making, under temporary names until it is whole."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name = folder, name
        self.dtype = _token_dtype(tokenizer.vocab_size)
        self.temporary = folder / f"{name}.bin.tmp"
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in close)
        self.hash = blake2b(digest_size=16)
        self.offsets = array("q", [0])

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def add(self, ids: list[int]) -> None:
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.offsets.append(self.tokens + len(ids))

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.folder / f"{self.name}.bin")
        buffer = BytesIO()
        np.save(buffer, np.frombuffer(self.offsets, dtype=np.int64).astype("<i8"), allow_pickle=False)
        write_atomic(self.folder / f"{self.name}.npy", buffer.getvalue())
        return {
            "name": self.name,
            "documents": len(self.offsets) - 1,
            "tokens": self.tokens,
            "bin_blake2b": self.hash.hexdigest(),
            "npy_blake2b": blake2b(buffer.getvalue(), digest_size=16).hexdigest(),
        }


def _groups(source: Source, skip: int) -> Iterator[list[Document]]:
    """Documents behind the first `skip`, in groups small enough to tokenise at once."""
    group: list[Document] = []
    characters = 0
    for index, document in enumerate(source):
        if index < skip:
            continue
        group.append(document)
        characters += len(document.text)
        if len(group) == _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it when a process dies."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system: two processes at once are the caller's care
        yield
        return
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _checksum(path: Path) -> str:
    state = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _read_progress(path: Path, folder: Path, dtype: np.dtype) -> dict[str, Any]:
    empty: dict[str, Any] = {"shards": [], "text_bytes": 0}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for shard in state["shards"]:
            _check_entry(shard, path)
            _map_tokens(folder / f"{shard['name']}.bin", dtype, shard["tokens"])
            _map_offsets(folder / f"{shard['name']}.npy", shard)
        return state
    except (OSError, ValueError, KeyError, TypeError):
        return empty  # nothing usable: begin at the first document


_META_TYPES = {
    "format": str,
    "fingerprint": str,
    "content_hash": str,
    "tokenizer": str,
    "vocab_size": int,
    "eos_id": int,
    "text_bytes": int,
    "dtype": str,
    "documents": int,
    "tokens": int,
    "skips": dict,
    "shards": list,
}


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no token data in {folder}: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is unreadable: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT!r}")
    for key, kind in _META_TYPES.items():
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, not {meta.get(key)!r}")
    if meta["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"{path}: dtype must be <u2 or <u4, not {meta['dtype']!r}")
    for shard in meta["shards"]:
        _check_entry(shard, path)
    for key in ("documents", "tokens"):
        if not meta["shards"] or sum(shard[key] for shard in meta["shards"]) != meta[key]:
            raise ValueError(f"{path}: {key} {meta[key]} is not the sum over its {len(meta['shards'])} shards")
    return meta


def _check_entry(shard: Any, path: Path) -> None:
    # A name with a path in it could point the reader at any file.
    if not isinstance(shard, dict) or not re.fullmatch(r"[0-9a-f]{16}-[0-9]{5}", str(shard.get("name"))):
        raise ValueError(f"{path}: not a shard entry: {shard!r}")
    if not all(isinstance(shard.get(key), int) and shard[key] > 0 for key in ("documents", "tokens")):
        raise ValueError(f"{path}: shard {shard['name']} needs positive counts of documents and tokens")


def _map_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    _check_size(path, tokens * dtype.itemsize)
    return np.memmap(path, dtype=dtype, mode="r")


def _map_offsets(path: Path, shard: dict[str, Any]) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"shard file {path} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"shard file {path} is truncated or damaged: {error}") from error
    if offsets.dtype != np.dtype("<i8") or offsets.shape != (shard["documents"] + 1,):
        raise ValueError(f"{path} holds {offsets.dtype} {offsets.shape}, not int64 ({shard['documents'] + 1},)")
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or np.any(offsets[1:] <= offsets[:-1]):
        raise ValueError(f"{path}: offsets must rise from 0 to {shard['tokens']}")
    return offsets


def _check_size(path: Path, expected: int) -> None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"shard file {path} is missing") from None
    if actual != expected:
        raise ValueError(f"shard file {path} has {actual} bytes, not {expected}: truncated or overwritten")
