"""The command ``gcfast doctor``: what is here, and whether it works, to paste into a report."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gcfast.cli.doctor.checks import in_a_line, run_all
from gcfast.errors import GcfastError

# By the names of their distributions; of several, the one that is installed.
PACKAGES = (
    ("gcfast",),
    ("torch",),
    ("numpy",),
    ("triton",),
    ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss"),
    ("onnx",),
    ("onnxscript",),
    ("onnxruntime", "onnxruntime-gpu"),
)


def examine(options: argparse.Namespace) -> None:
    """Print versions, devices and the result of each check.

    Raises:
        GcfastError: a check of what is installed here failed.
    """
    versions, devices, results = _versions(), _devices(), []
    if not options.json:
        _print(versions, devices)
    for result in run_all():
        results.append(result)
        if not options.json:  # at once: a broken library may end the process in the next one
            print(
                f"{result.name:<18} {result.status:<7} {result.seconds:5.1f} s  {result.detail}",
                flush=True,
            )
    if options.json:
        checks = [result._asdict() for result in results]
        facts = {"versions": versions, "devices": devices, "checks": checks}
        print(json.dumps(facts, indent=2))
    failed = [result.name for result in results if result.status == "failed"]
    if failed:
        raise GcfastError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")


def _print(versions: dict[str, str], devices: list[dict[str, Any]]) -> None:
    for name, value in versions.items():
        print(f"{name:<18} {value}")
    for device in devices:
        print(f"{device['device']:<18} {', '.join(str(v) for v in list(device.values())[1:])}")
    print(flush=True)


def _versions() -> dict[str, str]:
    found = {"python": f"{platform.python_version()}, {platform.platform()}"}
    for names in PACKAGES:
        installed = [f"{name} {v}" for name in names if (v := _version(name)) is not None]
        found[names[0]] = ", ".join(i.removeprefix(f"{names[0]} ") for i in installed) or "none"
    found["CUDA of torch"] = torch.version.cuda or "none"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """Processor and GPUs, each with its name."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor,
            "cores": f"{os.cpu_count()} cores",
            "threads": f"{torch.get_num_threads()} threads of torch",
        }
    ]
    for number in range(torch.cuda.device_count()):
        name = f"cuda:{number}"
        try:
            properties = torch.cuda.get_device_properties(number)
        except Exception as error:  # its driver counts a device that CUDA cannot use
            devices.append({"device": name, "name": f"cannot be used: {in_a_line(error)}"})
            continue
        devices.append(
            {
                "device": name,
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            }
        )
    return devices
