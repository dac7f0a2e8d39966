"""pytest-benchmark groups: one per op, case, dtype and direction; llmcore, torch's own operator and the reference in
each, after a check of the results. Run: pytest bench (add -k NAME, --benchmark-json=FILE). For ratios use
bench/report.py, which runs the implementations alternately."""

from __future__ import annotations

import pytest

from bench.cases import cases

CASES = list(cases())


@pytest.mark.parametrize(
    ("case", "implementation"),
    [pytest.param(case, name, id=f"{case.name} | {name}") for case in CASES for name in case.implementations()],
)
def test_op(case, implementation, benchmark):
    function = case.timed(case.implementations()[implementation])
    case.check()
    benchmark.group = case.name
    benchmark.pedantic(case.call, args=(function,), rounds=5, warmup_rounds=1)
