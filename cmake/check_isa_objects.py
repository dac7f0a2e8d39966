"""Fails the build when an object compiled for one instruction set defines a symbol that others could be given.

An inline function or template instance outside the instruction set's own namespace is a weak symbol: the linker keeps
one copy for the whole module, maybe the one with AVX-512 instructions, and a plain machine dies of SIGILL. So every
weak definition in a kernel object must live in `llmcore::cpu::<instruction set>`.

Usage: check_isa_objects.py NM OBJECT...
"""

import re
import subprocess
import sys


def foreign_weak_symbols(nm: str, objects: list[str]) -> list[str]:
    text = subprocess.run([nm, "-A", "-C", "--defined-only", *objects], check=True, capture_output=True, text=True)
    found = []
    for line in text.stdout.splitlines():
        match = re.match(r"(.*?):?\s*[0-9a-f]* ([WVu]) (.*)$", line)
        if not match:
            continue
        object_file, _, symbol = match.groups()
        isa = re.search(r"cpu_(\w+)\.dir", object_file)
        if isa is None or f"llmcore::cpu::{isa.group(1)}::" not in symbol:
            found.append(f"{object_file}: {symbol}")
    return found


if __name__ == "__main__":
    bad = foreign_weak_symbols(sys.argv[1], sys.argv[2:])
    if bad:
        print("weak symbols outside their instruction set's namespace:", *bad, sep="\n  ", file=sys.stderr)
        sys.exit(1)
