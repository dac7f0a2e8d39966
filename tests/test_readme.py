"""The README tells the truth about what serves what, and its Python example runs."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_support_matrix_is_current(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["support_matrix.py", "--check"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "docs" / "support_matrix.py"), run_name="__main__")
    assert not exit_.value.code


def test_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("attention: kernel on cpu")
