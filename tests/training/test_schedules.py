from __future__ import annotations

import itertools

import pytest

from llmcore.training.schedules import ScheduleConfig, learning_rate_factor, progress


def curve(config: ScheduleConfig) -> list[float]:
    return [learning_rate_factor(i / 1000, config) for i in range(1001)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_shape(kind):
    config = ScheduleConfig(kind=kind, warmup=0.1, decay=0.2, floor=0.05)
    values = curve(config)
    assert values[0] == 0.0
    assert values[50] == pytest.approx(0.5)
    assert values[100] == max(values) == pytest.approx(1.0)
    assert all(0.0 <= v <= 1.0 for v in values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[100:]))
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.011  # no jumps
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.05)


def test_known_points():
    cosine = ScheduleConfig(kind="cosine", warmup=0.2, floor=0.1)
    assert learning_rate_factor(0.6, cosine) == pytest.approx(0.55)  # half way down the cosine
    wsd = ScheduleConfig(kind="wsd", warmup=0.1, decay=0.4, floor=0.0)
    assert learning_rate_factor(0.59, wsd) == 1.0
    assert learning_rate_factor(0.8, wsd) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_edges_are_finite(kind, warmup, decay):
    values = curve(ScheduleConfig(kind=kind, warmup=warmup, decay=decay, floor=0.0))
    assert all(0.0 <= v <= 1.0 for v in values)


def test_progress_is_the_nearer_bound():
    assert progress(5, 10) == 0.5
    assert progress(5, 10, elapsed=30, max_seconds=40) == 0.75
    assert progress(9, 10, elapsed=30, max_seconds=40) == 0.9
    assert progress(5, 0, elapsed=30, max_seconds=40) == 0.75
    assert progress(11, 10) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "linear"}, "schedule.kind is 'linear'"),
        ({"warmup": 1.5}, "schedule.warmup is 1.5"),
        ({"kind": "wsd", "warmup": 0.6, "decay": 0.6}, "at most 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**values)
