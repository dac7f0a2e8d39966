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


def case(name, inside="", module="tests.models.test_x"):
    return f'<testcase classname="{module}" name="{name}">{inside}</testcase>'


def test_parity_matrix_claims_what_ran_and_passed(tmp_path):
    """And nothing else: not a skipped case, one of another folder, or a test that fills no column."""
    script = runpy.run_path(str(ROOT / "docs" / "parity_matrix.py"))
    file = tmp_path / "results.xml"
    cases = [
        case("test_logits[llama, tied]"), case("test_logits[llama]"), case("test_logits[t5, gated]", "<failure/>"),
        case("test_gradients[bert]", "<skipped/>"), case("test_logits[nothing]"), case("test_refuses[llama]"),
        case("test_gradients[llama]", module="tests.ops.test_y"), case("test_gradients[mistral]", "<error/>"),
    ]  # fmt: skip
    file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert script["read"](str(file)) == {
        ("llama", "test_logits"): [True, True],
        ("t5", "test_logits"): [False],
        ("mistral", "test_gradients"): [False],
    }
    rows = script["table"](script["read"](str(file))).splitlines()
    assert "| `llama` (LlamaForCausalLM) | 2 of 2 | - | - | - | - |" in rows
    assert "| `t5` (T5ForConditionalGeneration) | 0 of 1 | - | - | - | - |" in rows
    assert script["main"]([str(file), "--check"]) == "failed: test_logits[t5], test_gradients[mistral]"
    file.write_text(f"<testsuite>{case('test_logits[llama]')}</testsuite>")
    assert script["main"]([str(file), "--check"]) == "README.md: run python docs/parity_matrix.py"
    file.write_text("<testsuite></testsuite>")
    assert "holds no case of a family" in script["main"]([str(file)])


def test_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("attention: kernel on cpu")
