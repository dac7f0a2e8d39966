"""Imports go down only: no module imports from a layer above its own (docs/architecture.md, "The house")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmcore"

# layer -> layers it may import, besides itself
ALLOWED = {
    "reference": set(),
    "ops": {"reference", "_C"},
    "layers": {"ops"},
    "models": {"layers", "ops", "checkpoints"},
    "inference": {"models", "layers", "ops", "checkpoints", "tokenizers", "_C"},  # _C: its classes, which are no ops
    "tokenizers": set(),
    "data": {"tokenizers"},
    "checkpoints": {"_C"},  # the strings of a GGUF file's header
    "recipes": set(),
    "training": {"inference", "models", "layers", "ops", "data", "tokenizers", "checkpoints", "recipes"},
    "serve": {"inference", "models", "layers", "ops", "tokenizers", "checkpoints"},
    "evaluation": {"inference", "models", "layers", "ops", "data", "tokenizers", "checkpoints"},
}


def llmcore_imports(path: Path) -> set[str]:
    """Top-level layers of llmcore that the file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["llmcore", *path.relative_to(PACKAGE).parts[: -node.level], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "llmcore" else [base]
        found |= {name.split(".")[1] for name in names if name.startswith("llmcore.")}
    return found


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if len(p.relative_to(PACKAGE).parts) > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    layer = path.relative_to(PACKAGE).parts[0]
    assert layer in ALLOWED, f"{layer} is not a layer of docs/architecture.md"
    upward = llmcore_imports(path) - ALLOWED[layer] - {layer, "__version__", "build_info"}
    assert not upward, f"{path.name} of {layer} imports {upward}"


def test_reference_imports_torch_only():
    for path in (PACKAGE / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in ("torch", "math") for a in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ("torch", "__future__", "llmcore", "math", "dataclasses"), path


def test_kernels_are_torch_free():
    for folder in ("csrc/include", "csrc/cpu", "csrc/cuda"):
        for path in (PACKAGE.parent / folder).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
                assert "#include <torch" not in path.read_text(), f"{path} includes torch"
