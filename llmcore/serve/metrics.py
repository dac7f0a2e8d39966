"""What the server and its engine do, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)

_GAUGES = (
    ("waiting", "requests_waiting", "Sequences that wait for room in the engine."),
    ("running", "requests_running", "Sequences that the engine is writing or reading."),
    ("blocks_used", "cache_blocks_used", "Blocks of the key-value cache that running sequences hold."),
    ("blocks_total", "cache_blocks_total", "Blocks of the key-value cache."),
)
_COUNTERS = (
    ("prefix_tokens_queried", "prefix_cache_queried_tokens", "Tokens of prompts that were looked for in the cache."),
    ("prefix_tokens_hit", "prefix_cache_hit_tokens", "Tokens of prompts that were found there."),
    ("preemptions", "preemptions", "Sequences that had to give their blocks back for a while."),
    ("tokens_generated", "generated_tokens", "Tokens drawn."),
    ("tokens_prefilled", "prefilled_tokens", "Tokens of prompts run."),
    ("draft_tokens", "draft_tokens", "Tokens that speculation proposed."),
    ("draft_tokens_accepted", "draft_tokens_accepted", "Of these, those that were right."),
)


class Metrics:
    """`stats` gives the engine's numbers when Prometheus asks; None without an engine."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], Any] | None) -> None:
        self._stats = stats
        self.registry = CollectorRegistry()
        new = {"registry": self.registry}
        self.requests = Counter("llmcore_requests", "Requests answered, by path and status; 499: the client left.",
                                ["path", "status"], **new)  # fmt: skip
        self.in_flight = Gauge("llmcore_requests_in_flight", "Requests that are being served.", **new)
        self.seconds = Histogram("llmcore_request_seconds", "Time of a request.", ["path"], buckets=_SECONDS, **new)
        self.first_token = Histogram(
            "llmcore_time_to_first_token_seconds", "From a request's entry into the engine to its first token.",
            buckets=_SECONDS, **new,
        )  # fmt: skip
        self.per_token = Histogram(
            "llmcore_time_per_token_seconds", "Of a choice: the mean time of its tokens after the first.",
            buckets=_TOKEN_SECONDS, **new,
        )  # fmt: skip
        if stats is not None:
            self.registry.register(self)

    def collect(self) -> Iterator[Any]:
        """The engine's numbers: called by the registry."""
        stats = self._stats()
        for field, name, text in _GAUGES:
            yield GaugeMetricFamily(f"llmcore_{name}", text, value=getattr(stats, field))
        for field, name, text in _COUNTERS:
            yield CounterMetricFamily(f"llmcore_{name}", text, value=getattr(stats, field))
        used = stats.blocks_used / max(stats.blocks_total, 1)
        yield GaugeMetricFamily("llmcore_cache_use", "The share of the cache's blocks that is held.", value=used)
        rate = stats.prefix_tokens_hit / max(stats.prefix_tokens_queried, 1)
        text = "The share of prompts' tokens that the cache had, since the start."
        yield GaugeMetricFamily("llmcore_prefix_cache_hit_rate", text, value=rate)

    def describe(self) -> Iterable[Any]:
        return []

    def text(self) -> bytes:
        return generate_latest(self.registry)
