"""Writes the support matrix of README.md from the registry that dispatch uses.

python docs/support_matrix.py           rewrites the table between the markers
python docs/support_matrix.py --check   fails when README.md is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmcore.ops import registry, support

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix: docs/support_matrix.py -->", "<!-- end of support matrix -->"


def table() -> str:
    rows = ["| op | CPU kernel | CUDA kernel | reference | what it does |", "| --- | --- | --- | --- | --- |"]
    for name, served in support().items():
        cells = [", ".join(served.get(backend, [])) or "-" for backend in ("cpu", "cuda", "reference")]
        rows.append(f"| `{name}` | {' | '.join(cells)} | {'; '.join(registry[name].features)} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(with_table(text) != text and "README.md: run python docs/support_matrix.py")
    README.write_text(with_table(text), encoding="utf-8")
