from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc

import pytest

from llmcore.data import AnyFiles, JsonLines, Parquet, SkipReport, TextFiles, Texts, python_stdlib
from llmcore.data import readers as readers_module


def ids(source) -> list[str]:
    return [document.source_id for document in source]


def write(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# ---- text files


def test_folder_tree_in_sorted_order(tmp_path):
    names = ["b.txt", "a/z.MD", "a/b/c.txt", "c.bin", ".hidden.txt", ".git/x.txt"]
    root = write(tmp_path / "corpus", dict.fromkeys(names, "text"))
    assert ids(TextFiles(root, (".txt", ".md"))) == ["corpus/b.txt", "corpus/a/z.MD", "corpus/a/b/c.txt"]
    assert ids(TextFiles([root / "c.bin", root / "a"], (".txt",))) == ["c.bin", "a/b/c.txt"]


def test_text_is_given_exactly_but_for_the_byte_order_mark(tmp_path):
    text = "\ttabs\r\nand \rreturns\x00 \u2028 😀  \n\n"
    root = write(tmp_path, {"a.txt": b"\xef\xbb\xbf" + text.encode()})
    assert [document.text for document in TextFiles(root)] == [text]


def test_faulty_text_files_are_counted_and_skipped(tmp_path):
    root = write(tmp_path, {"bad.txt": b"one\ntwo\n\xff\n", "empty.txt": "", "blank.txt": " \n\t", "good.txt": "x"})
    write(root, {"cut.txt.gz": gzip.compress(os.urandom(5000))[:-900], "no.txt.gz": b"not gzip"})
    os.mkfifo(root / "pipe.txt")
    (root / "dangling.txt").symlink_to(root / "nowhere")
    source = TextFiles(root, (".txt", ".txt.gz"))
    assert ids(source) == [f"{root.name}/good.txt"]
    assert source.skips.counts == {
        "invalid UTF-8": 1,
        "empty document": 2,
        "not a regular file": 1,
        "unreadable or truncated file": 3,
    }
    assert source.skips.examples["invalid UTF-8"] == [f"{root}/bad.txt:3"]
    assert f"{root}/no.txt.gz (Not a gzipped file" in str(source.skips)
    assert [document.source_id for document in source] == [f"{root.name}/good.txt"]
    assert source.skips.total == 7, "the report is of one reading, not the sum of all"


def test_symbolic_links(tmp_path):
    root = write(tmp_path / "corpus", {"a.txt": "x", "sub/b.txt": "y"})
    (root / "up").symlink_to(root)
    (root / "self.txt").symlink_to("self.txt")
    source = TextFiles(root)
    assert ids(source) == ["corpus/a.txt", "corpus/sub/b.txt"]
    assert source.skips.examples["symbolic link to a folder"] == [f"{root}/up"]
    assert source.skips.counts == {"symbolic link to a folder": 1, "unreadable or truncated file": 1}
    with pytest.raises(FileNotFoundError, match=r"self\.txt does not exist"):
        TextFiles(root / "self.txt")


def test_a_link_is_read_as_its_own_name_says(tmp_path):
    """As in a download cache, where files with names are links to blobs without."""
    root = write(tmp_path, {"blob": gzip.compress(b'{"text": "packed"}\n')})
    (root / "a.jsonl.gz").symlink_to("blob")
    assert [(d.text, d.source_id) for d in JsonLines(root / "a.jsonl.gz")] == [("packed", "a.jsonl.gz:1")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    root = write(tmp_path, {"a.txt": "x", "locked/b.txt": "y", "c.txt": "z"})
    (root / "c.txt").chmod(0)
    (root / "locked").chmod(0)
    source = TextFiles(root)
    assert ids(source) == [f"{root.name}/a.txt"]
    assert source.skips.counts == {"unreadable folder": 1, "unreadable or truncated file": 1}
    (root / "locked").chmod(0o755)


def test_an_unreadable_member_without_need_of_permissions(tmp_path, monkeypatch):
    root = write(tmp_path, {"a.txt": "x", "b.txt": "y"})

    def refuse(path):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, "rb")

    monkeypatch.setattr(readers_module, "_open", refuse)
    source = TextFiles(root)
    assert ids(source) == [f"{root.name}/b.txt"]
    assert source.skips.examples["unreadable or truncated file"] == [f"{root}/a.txt (Permission denied)"]


@pytest.mark.parametrize(
    "text",
    ["line é\n" * 40, "😀é" * 50, "é" * 64, "a" * 64, "a" * 63 + "\n", "\n" * 200 + "x"],
    ids=["lines", "no lines", "two bytes each", "just full", "just full line", "blank lines"],
)
def test_long_files_come_in_parts_that_join_up(tmp_path, monkeypatch, text):
    monkeypatch.setattr(readers_module, "MAX_PART_BYTES", 64)
    root = write(tmp_path, {"a.txt": text})
    documents = list(readers_module.TextFiles(root)._read(root / "a.txt", "a.txt"))
    assert "".join(document.text for document in documents) == text
    assert all(0 < len(document.text.encode()) <= 64 for document in documents)
    assert len(documents) >= len(text.encode()) // 64


@pytest.mark.parametrize("text", ["line é\n" * 40, "word " * 60, "é" * 200, "\n" * 64 + "x" * 300])
def test_a_long_text_of_any_source_comes_in_parts_that_join_up(monkeypatch, text):
    monkeypatch.setattr(readers_module, "MAX_PART_BYTES", 64)
    documents = list(Texts(["short", text]))
    assert ids(documents)[:3] == ["text:0", "text:1", "text:1#1"]
    assert "".join(document.text for document in documents[1:]) == text
    assert all(0 < len(document.text) <= 64 for document in documents)
    assert len(documents) <= 3 + len(text) / 48
    if " " in text or text.startswith("line"):
        assert all(document.text[-1] in "\n " for document in documents[1:])


def test_paths_that_are_not_there_and_corpora_without_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        TextFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"\.gz \.md \.rst \.py\) holds no documents \(nothing skipped\)"):
        list(TextFiles(tmp_path))
    write(tmp_path, {"a.txt": b"\xff"})
    with pytest.raises(ValueError, match=r"/a\.txt holds no documents \(1 skipped: 1 invalid UTF-8 \(.*a\.txt:1\)\)"):
        list(TextFiles(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="no paths given"):
        TextFiles([])
    with pytest.raises(TypeError, match="must be a sequence"):
        TextFiles(tmp_path, ".txt")


def test_fingerprint_follows_files_and_options(tmp_path):
    write(tmp_path, {"a.txt": "x", "b.jsonl": "{}"})
    first = TextFiles(tmp_path).fingerprint()
    assert TextFiles(tmp_path).fingerprint() == first
    assert TextFiles(tmp_path, (".jsonl",)).fingerprint() != first
    write(tmp_path, {"a.txt": "xy"})
    assert TextFiles(tmp_path).fingerprint() != first
    assert JsonLines(tmp_path).fingerprint() != JsonLines(tmp_path, text_field="body").fingerprint()
    assert Texts(["ab", "c"]).fingerprint() != Texts(["a", "bc"]).fingerprint()


# ---- JSON lines


def test_json_lines_with_faults(tmp_path):
    lines = [
        b'{"text": "one", "url": "u", "n": 1}',
        b'{"text": "tw',
        b"",
        b"[1]",
        b'{"body": "x"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": " "}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    root = write(tmp_path, {"a.jsonl": b"\n".join(lines), "b.jsonl.gz": gzip.compress(b'{"text": "packed"}\n')})
    source = JsonLines(root, meta_fields=("url",))
    documents = list(source)
    assert [document.text for document in documents] == ["one", "last", "packed"]
    assert [document.meta for document in documents] == [{"url": "u"}, None, None]
    assert documents[1].source_id == f"{root.name}/a.jsonl:12"
    assert source.skips.counts == {
        "bad JSON": 2,
        "blank line": 1,
        "not a JSON object": 1,
        "no field 'text'": 2,
        "field 'text' is not text": 1,
        "invalid UTF-8": 1,
        "lone surrogate": 1,
        "empty document": 1,
    }
    assert source.skips.examples["bad JSON"] == [f"{root}/a.jsonl:2", f"{root}/a.jsonl:11"]


def test_a_truncated_gzip_keeps_its_head(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i} {os.urandom(20).hex()}"}) + "\n" for i in range(2000))
    root = write(tmp_path, {"a.jsonl.gz": gzip.compress(lines.encode())[:-20_000]})
    source = JsonLines(root)
    texts = [document.text for document in source]
    assert 0 < len(texts) < 2000
    assert all(json.loads(line)["text"] == text for line, text in zip(lines.splitlines(), texts))
    assert source.skips.counts["unreadable or truncated file"] == 1


def test_a_line_too_long_to_hold_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_LINE_BYTES", 100)
    long = json.dumps({"text": "x" * 350})
    root = write(tmp_path, {"a.jsonl": f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{long}'})
    source = JsonLines(root)
    assert ids(source) == [f"{root.name}/a.jsonl:1", f"{root.name}/a.jsonl:3"]
    assert source.skips.examples == {"line too long": [f"{root}/a.jsonl:2", f"{root}/a.jsonl:4"]}


def test_reading_takes_little_memory(tmp_path):
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    root = write(tmp_path, {"a.jsonl": line * 2000})
    tracemalloc.start()
    assert sum(len(document.text) for document in JsonLines(root)) == 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ---- Parquet


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "", "four"] * 200, "url": ["u"] * 800, "other": [1] * 800})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "c.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path, {"d.parquet": whole[: len(whole) // 2], "e.parquet": b"", "f.parquet": b"PAR1" + bytes(100)})
    raw = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffa")]
    )
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "g.parquet")
    source = Parquet(tmp_path, meta_fields=("url", "absent"))
    documents = list(source)
    assert [document.text for document in documents] == ["one", "four"] * 200 + ["a"]
    assert documents[0].meta == {"url": "u"}
    assert documents[1].source_id == f"{tmp_path.name}/a.parquet:4"
    assert source.skips.counts == {
        "no field 'text'": 200,
        "empty document": 200,
        "field 'text' is not text": 2,
        "no column 'text'": 1,
        "unreadable or truncated file": 3,
        "invalid UTF-8": 1,
    }
    assert len(source.skips.examples["empty document"]) == 5


def test_a_row_group_is_not_held_in_memory(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [os.urandom(2500).hex() for _ in range(4000)]})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    del table
    before = pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() for _ in Parquet(tmp_path))
    assert peak - before < 8_000_000


def test_a_damaged_row_group_costs_no_other_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i} {os.urandom(9).hex()}" for i in range(1, 31)]})
    parquet.write_table(table, file, row_group_size=10, write_page_checksum=True, compression="none")
    content = bytearray(file.read_bytes())
    content[content.index(b"row 15")] ^= 1  # a flipped bit
    file.write_bytes(content)
    source = Parquet(file)
    numbers = [*range(1, 11), *range(21, 31)]
    assert [(d.source_id, d.text.split()[1]) for d in source] == [(f"a.parquet:{i}", str(i)) for i in numbers]
    assert source.skips.counts == {"unreadable or truncated row group": 1}
    assert f"{file} rows 11 to 20 (" in str(source.skips)


def test_a_parquet_file_whose_names_are_no_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"], "meta": [1]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path, {"a.parquet": content.replace(b"meta", b"m\xffta"), "b.parquet": content})
    source = Parquet(tmp_path)
    assert ids(source) == [f"{tmp_path.name}/b.parquet:1"]
    assert source.skips.counts == {"unreadable or truncated file": 1}


def test_any_files_are_read_by_their_extension(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    packed = gzip.compress(b"packed")
    root = write(tmp_path / "c", {"a.md": "text", "b.JSONL": '{"body": "line"}\n{"text": 1}', "d.txt.gz": packed})
    write(root, {"e.bin": "left out"})
    parquet.write_table(pyarrow.table({"body": ["row"]}), root / "f.parquet")
    source = AnyFiles(root, text_field="body")
    assert {d.source_id: d.text for d in source} == {
        "c/a.md": "text",
        "c/b.JSONL:1": "line",
        "c/d.txt.gz": "packed",
        "c/f.parquet:1": "row",
    }
    assert source.skips.counts == {"no field 'body'": 1}
    assert [d.text for d in AnyFiles(root / "e.bin")] == ["left out"]
    assert AnyFiles(root).fingerprint() != source.fingerprint()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow"):
        Parquet(tmp_path)


# ---- the rest


def test_python_stdlib():
    source = python_stdlib()
    names = [path for path, _ in source._files(SkipReport())]
    assert len(names) > 300
    assert names == [path for path, _ in python_stdlib()._files(SkipReport())]
    relative = [path.relative_to(source.roots[0]).parts for path in names]
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    assert not [parts for parts in relative if unwanted.intersection(parts[:-1])]
    assert {("argparse.py",), ("json", "decoder.py")} <= set(relative)
    assert next(iter(source)).text


def test_skip_report_shows_a_few_of_many():
    report = SkipReport()
    for i in range(9):
        report.add("bad JSON", f"a:{i}")
    report.add("odd name", "caf\udce9.txt")
    text = "10 skipped: 9 bad JSON (a:0, a:1, a:2, a:3, a:4, ...); 1 odd name (caf\\udce9.txt)"
    assert str(report) == text
    assert str(SkipReport(**json.loads(json.dumps(report.as_dict())))) == text
