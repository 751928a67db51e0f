"""The GPU benchmark: the tests compiled, then every operation and the whole, in under ten minutes.

    python bench/gpu.py [--only SECTION …] [--quick] [--budget SECONDS] [--out FOLDER]

What the goals are about comes first, and every figure is on disk as soon as it is taken, so that a
run which is cut short keeps what it has.

Prints a short table and writes bench/results/<gpu>-<date>.json: every raw figure, the versions, the
commit, and the card's copy bandwidth and matrix rates measured in this run, which the floors are
made of. Sections that fail or run out of time are named, and the others still count. Peers (FAISS
on the GPU, torch-cam, captum, pytorch-grad-cam) are compared with where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cases import RATES, SIDE_SECONDS
from gpu_runner import (
    Context,
    Row,
    Section,
    driver,
    failed,
    record,
    result_path,
    run_sections,
    table,
    write,
)
from gpu_timing import CudaClock, card, copy_rate, matrix_rate

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 570.0
TESTS = ("ops", "kernels")  # the rooms whose tests run on the card, beside those marked `cuda`
TEST_SECONDS = 180.0
OPERATION_SECONDS = 100.0
MORE = ", more"  # of the sections with an operation's other cases
OPERATIONS = (
    "sparse_cam",
    "dense_cam",
    "knn",
    "grad_weights",
    "head_grad_weights",
    "top_m",
    "sample_triplets",
)
TAIL = 3000  # characters of the tests' output that are kept


def tests(context: Context) -> Iterator[Row]:
    """The operations' tests, compiled for this card: each file in a process, several at a time.

    Compiling keeps one core of the host busy for each; the card has room for all of them.
    """
    del context
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name in TESTS or "pytest.mark.cuda\n" in path.read_text()
    ]
    deadline = time.monotonic() + TEST_SECONDS
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        yield from pool.map(lambda path: run_tests(path, deadline - time.monotonic()), files)


def run_tests(path: Path, seconds: float) -> Row:
    """One file of tests in a process of its own, and how it ended."""
    # -P: the root is not on the path, where the source tree would hide the installed package.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(seconds, 1)
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")  # bytes, whatever `text` is
        code, output = -1, f"{said}\nnot done in {seconds:.0f} s"
    lines = output.strip().splitlines()
    row: Row = {
        "case": "the operations' tests, compiled",
        "side": path.stem,
        "text": ("" if code == 0 else "FAILED: ") + (lines[-1] if lines else "no output"),
        "returncode": code,
        "test_seconds": time.monotonic() - start,
    }
    if code != 0:
        row["output"] = output[-TAIL:]
    return row


def rates(context: Context) -> Iterator[Row]:
    """The card's copy bandwidth and matrix rates, which every floor is made of."""
    context.rates["copy"] = copy_rate(context.clock, context.device, seconds=0.5)
    yield {"case": "rates", "side": "copy", "text": f"{context.rates['copy'] / 1e9:.0f} GB/s"}
    for rate in RATES:
        try:
            context.rates[rate] = matrix_rate(context.clock, context.device, rate, seconds=0.5)
        except RuntimeError as error:  # no such product on this card: its floors are of bytes only
            yield failed("rates", f"product, {rate}", error)
            continue
        text = f"{context.rates[rate] / 1e12:.1f} Top/s"
        yield {"case": "rates", "side": f"product, {rate}", "text": text}


def _operation(name: str, *, quick: bool) -> Section:
    def run(context: Context) -> Iterator[Row]:
        from gpu_operations import run_operation

        yield from run_operation(name, context, quick=quick)

    return Section(name if quick else f"{name}{MORE}", OPERATION_SECONDS, run)


def _whole(name: str, seconds: float, module: str = "gpu_end_to_end") -> Section:
    def run(context: Context) -> Iterator[Row]:
        yield from getattr(importlib.import_module(module), name)(context)

    return Section(name, seconds, run)


# What the goals are about comes first, in case the time runs out: one or two cases of each
# operation, the whole, the tests, and then all the other cases.
SECTIONS = (
    Section("rates", 30.0, rates),
    *(_operation(name, quick=True) for name in ("sparse_cam", "grad_weights", "knn")),
    _whole("explain", 120.0),
    _whole("build", 60.0),
    _whole("transfer", 120.0, "gpu_transfer"),
    *(
        _operation(name, quick=True)
        for name in ("dense_cam", "head_grad_weights", "top_m", "sample_triplets")
    ),
    _whole("peers", 40.0),
    Section("tests", TEST_SECONDS + 10, tests),
    *(_operation(name, quick=False) for name in OPERATIONS),
)


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [s.name for s in SECTIONS if s.name != "rates" and not s.name.endswith(MORE)]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SECTION", help=", ".join(names)
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of each operation")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS,
        help="seconds after which nothing new is started",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    return parser.parse_args(command)


def chosen(only: list[str] | None, *, quick: bool = False) -> list[Section]:
    """The sections to run: the rates always, since floors are made of them."""
    return [
        section
        for section in SECTIONS
        if (only is None or section.name.removesuffix(MORE) in ("rates", *only))
        and not (quick and section.name.endswith(MORE))
    ]


def main(command: list[str] | None = None) -> int:
    """Returns 0, 1 where a section failed, 2 without a GPU."""
    asked = arguments(command)
    if not torch.cuda.is_available():
        print(
            "bench/gpu.py needs a CUDA device and a PyTorch built for it: torch "
            f"{torch.__version__} sees none",
            file=sys.stderr,
        )
        return 2
    # Read when the kernels are imported, by the sections and by the tests' process.
    os.environ.pop("TRITON_INTERPRET", None)
    device = torch.device("cuda", torch.cuda.current_device())
    properties = {**card(device), "driver": driver()}
    context = Context(
        device=device,
        clock=CudaClock(),
        l2_bytes=properties["l2_bytes"],
        memory_bytes=properties["memory_bytes"],
        quick=asked.quick,
        side_seconds=SIDE_SECONDS,
    )
    path = result_path(asked.out, properties["name"], time.strftime("%Y-%m-%d", time.gmtime()))
    results = run_sections(
        chosen(asked.only, quick=asked.quick),
        context,
        budget=asked.budget,
        save=lambda so_far: write(path, record(properties, context.rates, so_far)),
    )
    print(f"{properties['name']}, driver {properties['driver']}, torch {torch.__version__}")
    print(table(results))
    print(f"written: {path}")
    bad = any(
        result["error"] or any(row.get("returncode", 0) for row in result["rows"])
        for result in results
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
