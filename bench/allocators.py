"""What the memory allocator costs explain_batch on a CPU, and what it holds.

    python bench/allocators.py LIBRARY … [--network efficientnet-lite0] [--calls 60] [--json FILE]

Batches of 1 to 32 images, the same sizes in every run, in processes that take turns: the C
library's malloc, and each LIBRARY (libtcmalloc_minimal.so.4, libjemalloc.so.2) in LD_PRELOAD. Times
are CPU seconds of a process with one thread, of all calls after the first third. Memory is what is
resident after each third.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MALLOC = "the C library's malloc"
MOST = 32  # images of a batch


def run(name: str, calls: int) -> dict[str, Any]:
    """CPU seconds and memory of one process."""
    import torch
    from memory import resident_mib
    from subjects import explainer_with_rows, images, network

    torch.set_num_threads(1)
    explainer, many = explainer_with_rows(*network(name), 10_000), images(MOST)
    sizes = random.Random(0)
    resident, seconds = [], 0.0
    for call in range(calls):
        batch = many[: sizes.randint(1, MOST)].clone()
        began = time.process_time()
        explainer.explain_batch(batch, details=True)
        if call >= calls // 3:
            seconds += time.process_time() - began
        if (call + 1) % (calls // 3) == 0:
            resident.append(resident_mib())
    return {"seconds": seconds, "resident_mib": resident}


def in_a_process(library: str, name: str, calls: int) -> dict[str, Any]:
    environment = os.environ | ({} if library == MALLOC else {"LD_PRELOAD": library})
    program = [sys.executable, __file__, "--child", "--network", name, "--calls", str(calls)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    if "cannot be preloaded" in done.stderr:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from paired import conditions
    from subjects import NETWORKS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY")
    parser.add_argument("--network", choices=NETWORKS, default="efficientnet-lite0")
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.network, arguments.calls)))
        return
    names = [MALLOC, *arguments.libraries]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            runs[name].append(in_a_process(name, arguments.network, arguments.calls))
    for name in names:
        ratios = [
            one["seconds"] / other["seconds"]
            for one, other in zip(runs[MALLOC], runs[name], strict=True)
        ]
        memory = [round(x) for x in runs[name][-1]["resident_mib"]]
        print(
            f"{name}: malloc's time / its {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), MiB after each third {memory}"
        )
    if arguments.json:
        facts = {"conditions": conditions(), "network": arguments.network, "runs": runs}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
