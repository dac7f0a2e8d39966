"""Where text comes from: folders of files, JSON lines, Parquet, the standard library. One document at a time.

A corpus is never clean. What can't be read is skipped, counted by reason and shown with its place (`SkipReport`); only
a path that doesn't exist, or a corpus without a single document, is an error.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

TEXT_EXTENSIONS = (".txt", ".txt.gz", ".md", ".rst", ".py")
JSONL_EXTENSIONS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_EXTENSIONS = (".parquet",)
MAX_PART_BYTES = 4 << 20  # a longer text is cut into documents of at most this size: tokenising takes 140 times as much
MAX_LINE_BYTES = 64 << 20  # a longer JSON line is skipped: nobody wants it, and it must fit in memory
_EXAMPLES = 5


@dataclass(frozen=True)
class Document:
    """One text. `source_id` says where it came from and is the same on every machine; `meta` holds chosen fields."""

    text: str
    source_id: str
    meta: dict[str, Any] | None = None


@dataclass
class SkipReport:
    """What a reader left out: how many by reason, and the first few places (`path`, or `path:line`) of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(place.encode("utf-8", "backslashreplace").decode())  # undecodable file names must print

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "examples": {k: list(v) for k, v in self.examples.items()}}

    def __str__(self) -> str:
        if not self.counts:
            return "nothing skipped"
        return f"{self.total} skipped: " + "; ".join(
            f"{count} {reason} ({', '.join(self.examples[reason])}{', ...' if count > _EXAMPLES else ''})"
            for reason, count in sorted(self.counts.items())
        )


class Source:
    """A corpus that can be read again and again: iterating gives its `Document`s in an order that never changes.

    A text longer than `MAX_PART_BYTES` comes as several documents, cut at a line end where there is one. `skips` is the
    report of the latest iteration. Iterating raises ValueError when not one document was found.
    """

    skips: SkipReport

    def __init__(self) -> None:
        self.skips = SkipReport()

    def __iter__(self) -> Iterator[Document]:
        self.skips = SkipReport()
        found = False
        for document in self._documents():
            reason = _unusable(document.text)
            if reason:
                self.skips.add(reason, document.source_id)
                continue
            found = True
            for number, part in enumerate(cut(document.text, MAX_PART_BYTES)):
                source_id = f"{document.source_id}#{number}" if number else document.source_id
                yield replace(document, text=part, source_id=source_id)
        if not found:
            raise ValueError(f"{self.describe()} holds no documents ({self.skips})")

    def describe(self) -> str:
        """A few words for error messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of what the documents depend on. Files count by name, size and modification time, not content."""
        raise NotImplementedError

    def _documents(self) -> Iterator[Document]:
        raise NotImplementedError


class Texts(Source):
    """Texts already in memory."""

    def __init__(self, texts: Sequence[str], name: str = "text") -> None:
        super().__init__()
        self.texts, self.name = list(texts), name

    def describe(self) -> str:
        return f"{self.name!r}"

    def fingerprint(self) -> str:
        return digest([self.name, *self.texts])

    def _documents(self) -> Iterator[Document]:
        for index, text in enumerate(self.texts):
            yield Document(text, f"{self.name}:{index}")


class FileSource(Source):
    """Files given by name, and all files below given folders whose name ends in one of `extensions`.

    Hidden files and folders (a leading dot) are left out, symbolic links to folders are not followed but counted as
    skipped, and the order is that of the sorted paths. `exclude(relative_path)` may leave out more. A file named
    directly is read whatever its extension. Raises FileNotFoundError for a path that doesn't exist.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        extensions: Sequence[str],
        exclude: Callable[[Path], bool] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        self.roots = [Path(os.path.abspath(path)) for path in paths]  # links stay: a target's name may say less
        if not self.roots:
            raise ValueError("no paths given")
        for root in self.roots:
            if not root.exists():
                raise FileNotFoundError(f"corpus path {root} does not exist")
        if isinstance(extensions, str):
            raise TypeError(f"extensions must be a sequence such as ({extensions!r},)")
        self.extensions = tuple(extension.lower() for extension in extensions)
        self.exclude = exclude

    def describe(self) -> str:
        names = ", ".join(str(root) for root in self.roots[:3]) + (", ..." if len(self.roots) > 3 else "")
        folders = any(root.is_dir() for root in self.roots)
        return f"{names} (extensions {' '.join(self.extensions)})" if folders else names

    def fingerprint(self) -> str:
        parts = [type(self).__name__, *self._options()]
        for path, name in self._files(SkipReport()):
            try:
                status = path.stat()
                parts += [name, str(status.st_size), str(status.st_mtime_ns)]
            except OSError:
                parts += [name, "unreadable"]
        return digest(parts)

    def _options(self) -> list[str]:
        """Settings that change what documents come out of the same files."""
        return []

    def _files(self, skips: SkipReport) -> Iterator[tuple[Path, str]]:
        """(path, name): the name starts with that of the root given, so it doesn't depend on where that lies."""
        for root in self.roots:
            if not root.is_dir():
                yield root, root.name
                continue

            def unreadable(error: OSError) -> None:
                skips.add("unreadable folder", str(error.filename))

            for folder, subfolders, files in os.walk(root, onerror=unreadable):
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                for name in subfolders:
                    if os.path.islink(os.path.join(folder, name)):
                        skips.add("symbolic link to a folder", os.path.join(folder, name))
                for name in sorted(files):
                    if name.startswith(".") or not name.lower().endswith(self.extensions):
                        continue
                    path = Path(folder, name)
                    relative = path.relative_to(root)
                    if self.exclude is None or not self.exclude(relative):
                        yield path, f"{root.name}/{relative.as_posix()}"

    def _documents(self) -> Iterator[Document]:
        for path, name in self._files(self.skips):
            try:
                if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe or a device could wait for ever
                    self.skips.add("not a regular file", str(path))
                    continue
                yield from self._read(path, name)
            except (OSError, EOFError, zlib.error) as error:
                # Documents already given stay: a truncated archive loses its tail, not its head.
                self.skips.add("unreadable or truncated file", f"{path} ({_reason(error)})")

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        raise NotImplementedError


class TextFiles(FileSource):
    """Plain text in UTF-8 (unpacked if the name ends in .gz): each file one document, above 4 MiB several."""

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        extensions: Sequence[str] = TEXT_EXTENSIONS,
        exclude: Callable[[Path], bool] | None = None,
    ) -> None:
        super().__init__(paths, extensions, exclude)

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        with _open(path) as file:
            rest, line, first = b"", 1, True
            while True:
                data = rest + file.read(MAX_PART_BYTES - len(rest))
                last = len(data) < MAX_PART_BYTES
                end = len(data) if last else data.rfind(b"\n") + 1 or _character_boundary(data)
                part, rest = data[:end], data[end:]
                try:
                    if first:
                        yield Document(part.decode("utf-8-sig"), name)
                    elif part:
                        yield Document(part.decode("utf-8"), f"{name}:{line}")
                except UnicodeDecodeError as error:
                    bad_line = line + part.count(b"\n", 0, error.start)
                    self.skips.add("invalid UTF-8", f"{path}:{bad_line}")
                if last:
                    return
                first = False
                line += part.count(b"\n")


class JsonLines(FileSource):
    """One JSON object a line (also gzipped), its text in `text_field`; `meta_fields` are kept as `Document.meta`."""

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        text_field: str = "text",
        meta_fields: Sequence[str] = (),
        extensions: Sequence[str] = JSONL_EXTENSIONS,
    ) -> None:
        super().__init__(paths, extensions)
        self.text_field, self.meta_fields = text_field, tuple(meta_fields)

    def _options(self) -> list[str]:
        return [self.text_field, *self.meta_fields]

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
                if too_long:
                    while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                        pass
                    self.skips.add("line too long", f"{path}:{number}")
                    continue
                record, reason = _parse_line(line)
                if not reason:
                    reason = _text_fault(record, self.text_field)
                if reason:
                    self.skips.add(reason, f"{path}:{number}")
                    continue
                meta = {key: record[key] for key in self.meta_fields if key in record} or None
                yield Document(record[self.text_field], f"{name}:{number}", meta)


class Parquet(FileSource):
    """Parquet files with a string column `text_field`; `meta_fields` are kept as `Document.meta`. Needs pyarrow."""

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        text_field: str = "text",
        meta_fields: Sequence[str] = (),
        extensions: Sequence[str] = PARQUET_EXTENSIONS,
    ) -> None:
        super().__init__(paths, extensions)
        self.text_field, self.meta_fields = text_field, tuple(meta_fields)
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError("reading Parquet needs pyarrow: pip install pyarrow") from error

    def _options(self) -> list[str]:
        return [self.text_field, *self.meta_fields]

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        faults = (pyarrow.ArrowException, OSError, ValueError)  # ValueError: names in the file that are no UTF-8
        try:
            # Streamed: a row group, often a whole file, need not fit in memory.
            options = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 1 << 16}
            with pyarrow.parquet.ParquetFile(path, **options) as file:
                columns = [c for c in (self.text_field, *self.meta_fields) if c in file.schema_arrow.names]
                if self.text_field not in columns:
                    self.skips.add(f"no column {self.text_field!r}", str(path))
                    return
                first = 1
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    try:
                        yield from self._read_group(file, group, columns, path, name, first)
                    except faults as error:
                        place = f"{path} rows {first} to {first + rows - 1} ({_reason(error)})"
                        self.skips.add("unreadable or truncated row group", place)
                    first += rows
        except faults as error:
            self.skips.add("unreadable or truncated file", f"{path} ({_reason(error)})")

    def _read_group(
        self, file: Any, group: int, columns: list[str], path: Path, name: str, number: int
    ) -> Iterator[Document]:
        """The documents of one row group, whose first row is row `number` of the file."""
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
            arrays = [batch.column(column) for column in columns]
            for row in range(batch.num_rows):
                try:
                    record = {column: array[row].as_py() for column, array in zip(columns, arrays)}
                    reason = _text_fault(record, self.text_field)
                except UnicodeDecodeError:
                    reason = "invalid UTF-8"
                if reason:
                    self.skips.add(reason, f"{path}:{number + row}")
                    continue
                text = record.pop(self.text_field)
                yield Document(text, f"{name}:{number + row}", record or None)
            number += batch.num_rows


class AnyFiles(FileSource):
    """Text, JSONL and Parquet files together, each read as its extension says; a file with any other one as text."""

    def __init__(
        self, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], text_field: str = "text"
    ) -> None:
        super().__init__(paths, (*TEXT_EXTENSIONS, *JSONL_EXTENSIONS, *PARQUET_EXTENSIONS))
        self.text_field = text_field

    def _options(self) -> list[str]:
        return [self.text_field]

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        lower = path.name.lower()
        reader: FileSource
        if lower.endswith(JSONL_EXTENSIONS):
            reader = JsonLines(path, self.text_field)
        elif lower.endswith(PARQUET_EXTENSIONS):
            reader = Parquet(path, self.text_field)
        else:
            reader = TextFiles(path)
        reader.skips = self.skips
        return reader._read(path, name)


def python_stdlib() -> TextFiles:
    """The sources of the running Python's standard library: about 12 MB of code and prose that every machine has.

    Left out: installed packages (not the library), tests (over half of the whole, mostly repetitive assertions and
    data), `encodings` (generated character tables), and `_sysconfigdata` and `config-*` (this machine's paths).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}

    def exclude(path: Path) -> bool:
        return (
            not unwanted.isdisjoint(path.parts[:-1])
            or path.parts[0].startswith("config-")
            or path.name.startswith("_sysconfigdata")
        )

    return TextFiles(folder, extensions=(".py",), exclude=exclude)


def digest(parts: Iterable[str]) -> str:
    """Hash of a sequence of texts, each with its length, so that moving a boundary changes it."""
    state = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in parts of at most `size` characters: up to a line end if there is one, else a space, else anywhere."""
    at = 0
    while len(text) - at > size:
        end = text.rfind("\n", at, at + size) + 1 or text.rfind(" ", at, at + size) + 1 or at + size
        yield text[at:end]
        at = end
    yield text[at:]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _character_boundary(data: bytes) -> int:
    """The largest cut <= len(data) that doesn't split a UTF-8 character."""
    for back in range(1, 4):
        if data[-back] >= 0xC0:  # the first byte of a character of several bytes, which may go on in the next chunk
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _unusable(text: str) -> str | None:
    if not text.strip():
        return "empty document"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


def _parse_line(line: bytes) -> tuple[Any, str | None]:
    """(record, reason why not)."""
    if not line.strip():
        return None, "blank line"
    try:
        return json.loads(line.decode("utf-8-sig")), None
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "bad JSON"


def _text_fault(record: Any, text_field: str) -> str | None:
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get(text_field) is None:
        return f"no field {text_field!r}"
    if not isinstance(record[text_field], str):
        return f"field {text_field!r} is not text"
    return None


def _reason(error: BaseException) -> str:
    """One short line, without the path that OSError repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:80]
