"""Whether one commit is slower than another: their benchmarks, alternating in one run.

    python bench/latency.py BASE [HEAD] [--rounds 5] [--limit 1.10] [--select TEXT] [--json FILE]

Each commit is built into an environment of its own over the packages of this one (the extras
``dev`` and ``bench``). Then the
pytest-benchmark suites of both run in turn, so that both see the same hours of the machine. Of each
benchmark that both have, the ratio is the median over the rounds of HEAD's median time / BASE's.
The exit status is 1 where a ratio exceeds the limit. Baselines (plain PyTorch, NumPy, the forward
pass alone) are controls: their ratios show the machine's noise and do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from paired import conditions

ROOT = Path(__file__).resolve().parents[1]
CONTROLS = ("forward", "one by one", "autograd", "matmul + topk", "reference", "dense",
            "torch.topk", "FAISS + NumPy")  # fmt: skip
Times = dict[str, float]  # of each benchmark, the median in seconds


def is_control(name: str) -> bool:
    """Whether a benchmark times a baseline: one of its parameters names it."""
    return not set(CONTROLS).isdisjoint(name.partition("[")[2].rstrip("]").split("-"))


def ratios(base: list[Times], head: list[Times]) -> dict[str, float]:
    """The median over the rounds of head / base, of each benchmark that every round has."""
    names = set.intersection(*(set(times) for times in [*base, *head]))
    return {
        name: statistics.median(h[name] / b[name] for b, h in zip(base, head, strict=True))
        for name in sorted(names)
    }


def slower(found: dict[str, float], limit: float) -> list[str]:
    """The benchmarks of ours whose ratio exceeds the limit."""
    return [name for name, ratio in found.items() if ratio > limit and not is_control(name)]


class Build:
    """A commit's source, and an environment in which its gcfast is installed."""

    def __init__(self, commit: str, folder: Path) -> None:
        self.source, environment = folder / "source", folder / "environment"
        self.source.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "-C", ROOT, "archive", commit], check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", self.source], input=archive.stdout, check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        self.python = environment / "bin" / "python"
        base = {"base": str(environment), "platbase": str(environment)}
        packages = Path(sysconfig.get_path("purelib", "venv", base))
        # Paths alone: what makes an installed gcfast editable is not run for them.
        shared = [path for path in sys.path if Path(path).name == "site-packages"]
        (packages / "shared.pth").write_text("\n".join(shared))
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", self.source], check=True)

    def times(self, select: str) -> Times:
        """One run of the commit's own benchmarks."""
        files = sorted(str(path) for path in (self.source / "bench").glob("bench_*.py"))
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "record.json"
            options = ["-q", "-p", "no:cacheprovider", "-k", select, f"--benchmark-json={record}"]
            # Under pytest-xdist, whose variables a child inherits, nothing would be timed.
            hidden = ("PYTHONPATH", "PYTEST_")
            subprocess.run(
                [self.python, "-P", "-m", "pytest", *options, *files],
                cwd=self.source,
                env={k: v for k, v in os.environ.items() if not k.startswith(hidden)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            benchmarks = json.loads(record.read_text())["benchmarks"]
        return {one["fullname"]: one["stats"]["median"] for one in benchmarks}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.10, help="ratio that fails")
    parser.add_argument("--select", default="", help="as pytest's -k")
    parser.add_argument("--json", type=Path, help="write the times of every round here")
    arguments = parser.parse_args(argv)
    commits = arguments.base, arguments.head
    with tempfile.TemporaryDirectory() as folder:
        builds = [Build(commit, Path(folder) / str(i)) for i, commit in enumerate(commits)]
        rounds: list[list[Times]] = [[], []]
        for i in range(arguments.rounds):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                rounds[which].append(builds[which].times(arguments.select))
    found = ratios(*rounds)
    for name, ratio in found.items():
        print(f"{ratio:6.3f} {'(control) ' if is_control(name) else ''}{name}")
    if arguments.json is not None:
        record = dict(zip(commits, rounds, strict=True))
        arguments.json.write_text(json.dumps({"conditions": conditions(), "times": record}))
    failed = slower(found, arguments.limit)
    for name in failed:
        print(f"slower by more than {arguments.limit - 1:.0%}: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
