"""What a card prefers: every kernel's blocks and warps tried, and the table for kernels/launch.py.

    python bench/sweep_launch.py [--only OPERATION …] [--seconds S] [--json FILE]

For each quick case of bench/cases.py the launcher's own choice is taken down and varied along the
axes below, every combination. A variant is timed when its result agrees with the present choice's;
one that does not is named, one that the card has no room for is counted. Prints the present
choice's time, the fastest variants, and the fastest as the line that launch.py would hold; changing
launch.py is left to a person, who sees how much there is to gain.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import CASES, Case, copies
from gpu_operations import OPERATIONS, Inputs
from gpu_timing import Clock, CudaClock, card

SHOWN = 5  # of the fastest variants
TOLERANCE = 1e-3  # relative, between the results of two launches

# With a fraction among them, values are times the present number.
Axes = dict[str, Sequence[Any]]
AXES: dict[str, Axes] = {
    "sparse_cam": {
        "num_warps": (2, 4, 8),
        "block_m": (4, 8, 16, 32, 64),
        "block_oh": (4, 8, 16, 32),
        "block_ow": (64, 128, 256),
    },
    # A program's channels are a multiple of 32 or 64, and so of these blocks.
    "dense_cam": {"block_c": (16, 32), "num_warps": (2, 4, 8)},
    "grad_weights": {
        "channels": (0.25, 0.5, 1, 2),  # times the present number, in whole vectors
        "block_t": (1, 2, 4, 8),
        "splits": (1, 2, 4, 8),
        "num_warps": (2, 4, 8, 16),
    },
    "head_grad_weights": {
        "block_rows": (16, 32, 64, 128),
        "block_c": (32, 64, 128),
        "block_d": (16, 32, 64),
        "num_warps": (4, 8),
    },
    "knn": {
        "block_n": (32, 64, 128),
        "block_d": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "top_m": {"num_warps": (1, 2, 4, 8), "block_c": (256, 512, 1024, 2048)},
}


class Tried(NamedTuple):
    """A variant and its seconds a call."""

    config: Any
    seconds: float


class Sweep(NamedTuple):
    """What became of a case's variants."""

    now: Tried  # the present choice
    tried: list[Tried]  # by time
    failed: int  # that could not be launched
    wrong: list[Any]  # that gave another result


def present_choice(operation: str, inputs: Inputs) -> Any:
    """The configuration that the launcher chooses for these inputs, taken down as it does so."""
    module, name = importlib.import_module(f"gcfast.kernels.{operation}"), f"{operation}_config"
    choose = getattr(module, name)
    taken = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        taken.append(choose(*args, **kwargs))
        return taken[-1]

    with mock.patch.object(module, name, noted):
        launch(operation, inputs, None)
    return taken[-1]


def launch(operation: str, inputs: Inputs, config: Any) -> Any:
    """The operation by its kernel, launched so; None for the launcher's own choice."""
    module = importlib.import_module(f"gcfast.kernels.{operation}")
    options = {"precision": inputs["precision"]} if "precision" in inputs else {}
    launcher = functools.partial(getattr(module, f"launch_{operation}"), config=config, **options)
    return OPERATIONS[operation].call(launcher, inputs)


def variants(config: Any, axes: Axes, case: Case) -> Iterator[Any]:
    """Every combination of the axes, the other fields as they are; fields it has not are left."""
    present = config._asdict()
    known = {
        name: dict.fromkeys(int(present[name] * v) or present[name] for v in values)
        if any(isinstance(v, float) for v in values)
        else values
        for name, values in axes.items()
        if name in present
    }
    for values in itertools.product(*known.values()):
        change = dict(zip(known, values, strict=True))
        if change.get("channels"):
            change |= _whole_channels(change["channels"], case)
        yield config._replace(**change)


def _whole_channels(channels: int, case: Case) -> dict[str, int]:
    """So many channels of a run, in whole vectors, with the alignment that follows."""
    P = case.sizes["H"] * case.sizes["W"]
    vector = 16 // case.torch_dtype().itemsize
    step = vector // math.gcd(P, vector)
    channels = max(step, channels // step * step)
    return {"channels": channels, "align": math.gcd(channels * P, vector)}


def sweep(
    case: Case,
    clock: Clock,
    device: torch.device,
    *,
    axes: Axes,
    seconds: float,
    l2_bytes: int,
    memory_bytes: int,
) -> Sweep:
    """The present choice, and every variant of it that can be launched."""
    torch.manual_seed(0)
    name, count = case.operation, copies(case, l2_bytes, memory_bytes)
    sets = [OPERATIONS[name].inputs(case, device) for _ in range(count)]
    present = present_choice(name, sets[0])
    wanted = launch(name, sets[0], present)

    def timed(config: Any) -> Tried:
        calls = [functools.partial(launch, name, inputs, config) for inputs in sets]
        return Tried(config, clock.measure(calls, seconds=seconds).median)

    tried: list[Tried] = []
    wrong: list[Any] = []
    failed, now = 0, timed(present)
    for config in dict.fromkeys(variants(present, axes, case)):
        try:
            got = launch(name, sets[0], config)
        except Exception:  # no registers or shared memory for it, in the compiler's own kinds
            failed += 1
            continue
        if OPERATIONS[name].compare(got, wanted) <= TOLERANCE:
            tried.append(timed(config))
        else:
            wrong.append(config)
    return Sweep(now, sorted(tried, key=lambda one: one.seconds), failed, wrong)


def compile_part(case: Case, device: torch.device, *, axes: Axes, part: int, parts: int) -> None:
    """Launch every ``parts``-th variant once, from number ``part`` on."""
    inputs = OPERATIONS[case.operation].inputs(case, device)
    present = present_choice(case.operation, inputs)
    for config in list(dict.fromkeys(variants(present, axes, case)))[part::parts]:
        with contextlib.suppress(Exception):  # the sweep itself counts those that fail
            launch(case.operation, inputs, config)


def report(case: Case, found: Sweep) -> str:
    """The lines about one case."""
    now, tried, failed, wrong = found
    lines = [
        f"{case.operation}: {case.name}",
        f"  now     {now.seconds * 1e6:9.1f} us  {now.config}",
    ]
    lines += [f"          {one.seconds * 1e6:9.1f} us  {one.config}" for one in tried[:SHOWN]]
    if tried:
        lines.append(f"  best is {tried[0].seconds / now.seconds:.2f} x now: {tried[0].config!r}")
    lines.append(f"  {len(tried)} variants timed, {failed} could not be launched")
    if wrong:
        lines.append(f"  {len(wrong)} GAVE ANOTHER RESULT, the first {wrong[0]!r}")
    return "\n".join(lines)


def main(command: list[str] | None = None) -> int:
    """Returns 0, 1 where a variant gave another result, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--seconds", type=float, default=0.05, help="that a variant is timed for")
    parser.add_argument(
        "--jobs", type=int, default=(os.cpu_count() or 2) // 2, help="processes that compile"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of the jobs, this process's
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(command)
    if not torch.cuda.is_available():
        print(
            "bench/sweep_launch.py needs a CUDA device and a PyTorch built for it: torch "
            f"{torch.__version__} sees none",
            file=sys.stderr,
        )
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    device = torch.device("cuda", torch.cuda.current_device())
    swept = [case for name in asked.only for case in CASES[name] if case.quick]
    if asked.part is not None:
        for case in swept:
            axes = AXES[case.operation]
            compile_part(case, device, axes=axes, part=asked.part, parts=asked.jobs)
        return 0
    again = [sys.executable, __file__, "--only", *asked.only, "--jobs", str(asked.jobs)]
    parts = [subprocess.Popen([*again, "--part", str(i)]) for i in range(asked.jobs)]
    for process in parts:
        process.wait()
    properties = card(device)
    print(properties)
    found = []
    with torch.no_grad():
        for case in swept:
            result = sweep(
                case,
                CudaClock(),
                device,
                axes=AXES[case.operation],
                seconds=asked.seconds,
                l2_bytes=properties["l2_bytes"],
                memory_bytes=properties["memory_bytes"],
            )
            print(report(case, result), flush=True)
            found.append(
                {
                    "operation": case.operation,
                    "case": case.name,
                    "now": [result.now.config._asdict(), result.now.seconds],
                    "tried": [[one.config._asdict(), one.seconds] for one in result.tried],
                    "failed": result.failed,
                    "wrong": [config._asdict() for config in result.wrong],
                }
            )
    if asked.json:
        asked.json.write_text(json.dumps({"card": properties, "cases": found}, indent=1) + "\n")
    return 1 if any(case["wrong"] for case in found) else 0


if __name__ == "__main__":
    sys.exit(main())
