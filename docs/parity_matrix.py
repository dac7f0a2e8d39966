"""Writes the parity matrix of README.md from the results of a test run, so that it says what was run and passed.

pytest tests/models --junitxml=FILE
python docs/parity_matrix.py FILE           rewrites the table between the markers
python docs/parity_matrix.py FILE --check   fails when README.md is out of date, or a check of the table did not pass
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from llmcore.models.families import FAMILIES

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- parity matrix: docs/parity_matrix.py -->", "<!-- end of parity matrix -->"
# The tests whose parameter is a case of a family, in any file of tests/models: "mistral", "qwen2, windows".
CHECKS = {
    "test_logits": "logits",
    "test_gradients": "gradients",
    "test_cached_decode": "cached decoding",
    "test_padding_and_packing": "padding and packing",
    "test_saved_is_what_was_loaded": "saved, then read by `transformers`",
}

Results = dict[tuple[str, str], list[bool]]  # (family, test) -> whether each case passed


def read(path: str) -> Results:
    """The cases that ran, out of a file that pytest wrote with --junitxml."""
    results: Results = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(test_\w+)\[([^,\]]+)(?:, .*)?\]", case.get("name", ""))
        if not match or match[1] not in CHECKS or match[2] not in FAMILIES:
            continue
        if ".models." not in f"{case.get('classname')}." or case.find("skipped") is not None:
            continue
        results[match[2], match[1]].append(case.find("failure") is None and case.find("error") is None)
    return results


def table(results: Results) -> str:
    rows = [f"| family | {' | '.join(CHECKS.values())} |", "| --- |" + " --- |" * len(CHECKS)]
    for name, family in FAMILIES.items():
        cells = []
        for check in CHECKS:
            cases = results.get((name, check), [])
            cells.append(f"{sum(cases)} of {len(cases)}" if cases else "-")
        rows.append(f"| `{name}` ({family.architecture}) | {' | '.join(cells)} |")
    return "\n".join(rows)


def with_table(text: str, results: Results) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> str | None:
    """Gives what is wrong, or None."""
    check, files = "--check" in arguments, [a for a in arguments if not a.startswith("-")]
    if len(files) != 1:
        return __doc__
    results, text = read(files[0]), README.read_text(encoding="utf-8")
    if not results:
        return f"{files[0]}: holds no case of a family; run pytest tests/models --junitxml={files[0]}"
    if check:
        if failed := [f"{test}[{name}]" for (name, test), cases in results.items() if not all(cases)]:
            return f"failed: {', '.join(failed)}"
        return "README.md: run python docs/parity_matrix.py" if with_table(text, results) != text else None
    README.write_text(with_table(text, results), encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
