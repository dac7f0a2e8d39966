"""How attention's tasks would be divided among many workers: a simulation of the hand-out, with the work of a task
modelled as the pairs of rows and keys it computes.

    python bench/balance.py [--workers 64]

Tasks come in the kernel's own order (`TaskList` and `Forward::queries_per_task` of csrc/cpu/attention.cpp for bf16,
`Backward::run` of attention_backward.cpp, whose rules are repeated here). Forward a worker begins with tasks of its own
(`parallel_own_tasks`), backward they are handed out one by one. Prints the idle tail: by how much the last worker ends
after the mean.
"""

from __future__ import annotations

import argparse
import heapq

TASKS_PER_WORKER = 8
SUB_ROWS, TASK_ELEMS, TASK_ROWS, PACKED_ELEMS, TILE_KEYS, BLOCK_ROWS = 48, 64 * 1024, 384, 96 * 1024, 128, 3 * 48


def keys_seen(first: int, queries: int, seq: int, window: int | None) -> int:
    """Sum over queries [first, first + queries) of the keys that a causal row sees."""
    return sum(min(q + 1, window or seq) for q in range(first, min(first + queries, seq)))


def forward_tasks(batch: int, heads: int, kv_heads: int, seq: int, dim: int, window: int | None, workers: int) -> list:
    group = heads // kv_heads
    rows = max(SUB_ROWS, min(TASK_ELEMS // (dim // 2 + dim) // SUB_ROWS * SUB_ROWS, TASK_ROWS))
    block_keys = PACKED_ELEMS // dim // TILE_KEYS * TILE_KEYS
    if window and window < block_keys:
        rows = max(rows, min((block_keys - window) * group // SUB_ROWS * SUB_ROWS, 2 * TASK_ROWS))
    while rows > SUB_ROWS and batch * seq * heads // rows < TASKS_PER_WORKER * workers:
        rows -= SUB_ROWS
    queries = max(1, rows // group)
    blocks = [group * keys_seen(first, queries, seq, window) for first in range(0, seq, queries)]
    return [work for _ in range(batch) for work in reversed(blocks) for _ in range(kv_heads)]


def backward_tasks(batch: int, heads: int, kv_heads: int, seq: int, window: int | None, workers: int) -> list:
    group, pairs = heads // kv_heads, batch * kv_heads
    splits = 1 if pairs >= 2 * workers else -(-2 * workers // pairs)
    rows = BLOCK_ROWS
    while splits > 1 and rows > SUB_ROWS and seq * group // rows < 8 * splits:
        rows -= SUB_ROWS
    queries = max(1, rows // group)
    blocks = [group * keys_seen(first, queries, seq, window) for first in range(0, seq, queries)]
    shares = [0] * splits
    for i, work in enumerate(blocks):  # there and back, so that early and late blocks meet in a share
        turn, place = divmod(i, splits)
        shares[splits - 1 - place if turn % 2 else place] += work
    return shares * pairs


def tail(tasks: list, workers: int, own_rounds: int = 0) -> float:
    """(end of the last worker) / (mean) - 1. `own_rounds`: tasks that each worker takes by a fixed rule, there and
    back, before the rest is handed out one by one."""
    own = own_rounds * workers
    ends = [
        float(sum(tasks[i * workers + (workers - 1 - w if i % 2 else w)] for i in range(own_rounds)))
        for w in range(workers)
    ]
    heapq.heapify(ends)
    for work in tasks[own:]:
        heapq.heappush(ends, heapq.heappop(ends) + work)
    return max(ends) * workers / sum(tasks) - 1


def own_rounds(tasks: int, workers: int) -> int:
    rounds = tasks // workers
    return 0 if rounds < 8 else rounds * 3 // 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    workers = parser.parse_args().workers
    for batch, heads, kv_heads, seq, dim, window in (
        (1, 32, 8, 512, 128, None), (4, 8, 4, 512, 64, None), (1, 32, 8, 2048, 128, None), (1, 32, 8, 2048, 64, None),
        (1, 32, 8, 8192, 128, None), (1, 8, 2, 8192, 128, None), (1, 32, 8, 4096, 128, 256),
        (64, 32, 8, 2048, 128, None),
    ):  # fmt: skip
        forward = forward_tasks(batch, heads, kv_heads, seq, dim, window, workers)
        backward = backward_tasks(batch, heads, kv_heads, seq, window, workers)
        own = tail(forward, workers, own_rounds(len(forward), workers))
        shape = f"batch {batch}, {heads}/{kv_heads} heads, S {seq}, D {dim}{f', window {window}' if window else ''}"
        print(
            f"{shape:44} forward {len(forward):6} tasks, tail {own:6.1%}   "
            f"backward {len(backward):6} tasks, tail {tail(backward, workers):6.1%}"
        )


if __name__ == "__main__":
    main()
