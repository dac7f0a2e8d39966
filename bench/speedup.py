"""What a second thread brings: two results of bench/cpu_table.py, one of each number of threads, side by side.

python bench/cpu_table.py --threads 1 --json one.json
python bench/cpu_table.py --threads 2 --json two.json
python bench/speedup.py one.json two.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fewer", type=Path, help="results with fewer threads")
    parser.add_argument("more", type=Path, help="results with more threads")
    options = parser.parse_args()
    fewer, more = (json.loads(path.read_text()) for path in (options.fewer, options.more))

    def by_name(table: dict) -> dict[tuple[str, ...], dict[str, float]]:
        return {tuple(r[k] for k in ("kernel", "case", "dtype", "direction")): r["ms"] for r in table["results"]}

    before, after = by_name(fewer), by_name(more)
    columns = [f"{table['machine']['threads']} threads, ms" for table in (fewer, more)]
    print(f"| kernel | {' | '.join(columns)} | speed-up | of the peers |\n| --- | --- | --- | --- | --- |")
    for name in (n for n in before if n in after):
        own, others = before[name], after[name]
        peers = "; ".join(f"{p} {own[p] / others[p]:.2f}x" for p in own if p in others and p != "llmcore")
        ratio = own["llmcore"] / others["llmcore"]
        print(f"| {', '.join(name)} | {own['llmcore']:.3f} | {others['llmcore']:.3f} | {ratio:.2f}x | {peers} |")
    for missing in sorted(set(before) ^ set(after)):
        print(f"only in one of them: {', '.join(missing)}")


if __name__ == "__main__":
    main()
