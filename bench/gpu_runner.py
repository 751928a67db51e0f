"""Sections of a benchmark run: their time, their failures, the record and the table."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Case
from gpu_timing import Clock, Timing
from paired import conditions

FORMAT = 1
PACKAGES = ("triton", "faiss-gpu", "faiss-cpu", "torchcam", "captum", "grad-cam", "transformers")

Row = dict[str, Any]


@dataclass
class Context:
    """What every section needs."""

    device: torch.device
    clock: Clock
    l2_bytes: int
    memory_bytes: int
    quick: bool
    side_seconds: float  # that one side of one case is timed for
    rates: dict[str, float] = field(default_factory=dict)  # "copy" and those of cases.RATES

    def measure(self, calls: list[Callable[[], object]], *, graph: bool = True) -> Timing:
        """The calls in rotation; see :class:`gpu_timing.Clock`."""
        return self.clock.measure(calls, seconds=self.side_seconds, graph=graph)


class Section(NamedTuple):
    """One part of a run."""

    name: str
    seconds: float  # it may take, compilation included
    run: Callable[[Context], Iterator[Row]]


def run_sections(
    sections: Iterable[Section],
    context: Context,
    *,
    budget: float,
    save: Callable[[list[Row]], None] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Each section until it ends, fails, or its time or the whole budget is over.

    A section that fails keeps the rows it had, with the traceback; the next one runs. A section is
    cut between two rows, so the last row may overrun.

    Args:
        sections: in order.
        context: handed to each.
        budget: seconds for all of them.
        save: called with the results so far after each row, since a time limit may end the run.
        now: the clock.
    """
    began = now()
    results: list[Row] = []
    for section in sections:
        start = now()
        left = budget - (start - began)
        result: Row = {"section": section.name, "rows": [], "error": None, "cut": None}
        results.append(result)
        if left <= 0:
            result["cut"] = f"not started: the budget of {budget:.0f} s was used up"
        else:
            allowed = min(left, section.seconds)
            try:
                for row in section.run(context):
                    result["rows"].append(row)
                    if save is not None:
                        save(results)
                    if now() - start > allowed:
                        result["cut"] = f"stopped after {allowed:.0f} s"
                        break
            except Exception:  # whatever it was, the other sections are still worth having
                result["error"] = traceback.format_exc()
        result["seconds"] = now() - start
        if save is not None:
            save(results)
    return results


def timed(case: str, side: str, taken: Timing) -> Row:
    """The record of one side's time."""
    return {
        "case": case,
        "side": side,
        "seconds": taken.seconds,
        "how": taken.how,
        "calls": taken.calls,
        "median": taken.median,
        "quartiles": taken.quartiles,
    }


def measured(case: Case, side: str, taken: Timing, rates: dict[str, float]) -> Row:
    """The record of one side of one case, with its floor."""
    copy, arithmetic = rates["copy"], rates.get(case.rate, math.inf)
    floor = case.floor_seconds(copy, arithmetic)
    return {
        **timed(case.name, side, taken),
        "operation": case.operation,
        "sizes": case.sizes,
        "dtype": case.dtype,
        "options": case.options,
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": case.rate,
        "bound": case.bound(copy, arithmetic),
        "floor": floor,
        "share": floor / taken.median,
        "expected": case.expected,
        "because": case.because,
    }


def failed(case: str, side: str, error: Exception) -> Row:
    """The record of a side that did not run."""
    return {"case": case, "side": side, "error": f"{type(error).__name__}: {error}"}


def attempted(case: str, side: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, and what fails among them as one row more: the section goes on."""
    try:
        yield from rows
    except Exception as error:  # any: one comparison less
        yield failed(case, side, error)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """The driver's version, "" where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def record(card: dict[str, Any], rates: dict[str, float], results: list[Row]) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "card": card,
        "conditions": conditions(),
        "versions": versions(),
        "rates": rates,
        "sections": results,
    }


def result_path(folder: Path, card_name: str, day: str) -> Path:
    """bench/results/<gpu>-<date>.json, the name as a file name has it."""
    name = re.sub(r"[^a-z0-9]+", "-", card_name.lower()).strip("-")
    return folder / f"{name}-{day}.json"


def write(path: Path, contents: dict[str, Any]) -> None:
    """The record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(contents, indent=1) + "\n")
    temporary.replace(path)


def importable(module: str) -> bool:
    """Whether a peer is installed and can be imported; a broken one counts as missing."""
    try:
        importlib.import_module(module)
    except Exception:  # a peer's import fails in many ways, and each means the same here
        return False
    return True


def table(results: list[Row]) -> str:
    """The short table: each case with every side beside the first, which is ours."""
    lines = []
    for result in results:
        lines.append(f"== {result['section']} ({result.get('seconds', 0):.0f} s)")
        ours: dict[str, tuple[str, float]] = {}
        shown = None
        for row in result["rows"]:
            if row["case"] != shown:
                shown = row["case"]
                lines.append(f"  {shown}")
            lines.append(f"    {_line(row, ours)}")
        if result["error"]:
            lines.append(f"  FAILED: {result['error'].strip().splitlines()[-1]}")
        if result["cut"]:
            lines.append(f"  CUT: {result['cut']}")
    return "\n".join(lines)


def _line(row: Row, ours: dict[str, tuple[str, float]]) -> str:
    if "error" in row:
        return f"{row['side']:<28} failed: {row['error'].splitlines()[0][:90]}"
    if "median" not in row:
        return f"{row['side']:<28} {row['text']}"
    text = f"{row['side']:<28} {_time(row['median']):>10} ({row['how']})"
    first, first_median = ours.setdefault(row["case"], (row["side"], row["median"]))
    if first != row["side"]:
        return f"{text}  {row['median'] / first_median:6.2f} x {first}"
    if "share" in row:
        if row["bound"] == "arithmetic":
            text += f"  {row['flops'] / row['median'] / 1e12:7.1f} Top/s"
        else:
            text += f"  {row['bytes'] / row['median'] / 1e9:7.0f} GB/s "
        text += f"  {row['share']:4.0%} of the {row['bound']} floor"
        text += f" (predicted {row['expected']:.0%})"
    return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
