"""Compiling kernels for GPUs that are not there.

Triton compiles for a named target without one, but not in a process where its interpreter is on. So
this file is also a program: ``python offline.py MODULE`` compiles every specialisation of a kernel
file for every target and prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Shared memory that one block may have: CUDA programming guide, table of technical specifications
# by compute capability; AMD CDNA 3 ISA, section 1.2 (LDS).
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = tuple(SHARED_LIMIT_BYTES)


def compile_elsewhere(
    module: str, cache: Path, *, path: Path | None = None
) -> list[dict[str, Any]]:
    """What became of each specialisation of a module, compiled for each target by a child process.

    Args:
        module: what to import, with a function ``specialisations``.
        cache: a folder for Triton's cache.
        path: where the module is, when it is not installed.

    Returns:
        Dicts with "target", "name", "error" (or None), "shared" (bytes), "spills" (bytes on the
        stack, or on AMD spilled registers).
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if path is not None:
        # An empty entry would be the working directory, where `gcfast` is the source tree.
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([before] if before else [])])
    done = subprocess.run(
        [sys.executable, __file__, module],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def problems(results: list[dict[str, Any]], target: str) -> list[str]:
    """One line for each specialisation that does not fit the target."""
    found = []
    for result in results:
        if result["target"] != target:
            continue
        if result["error"]:
            found.append(f"{result['name']}: {result['error']}")
        elif result["shared"] > SHARED_LIMIT_BYTES[target]:
            found.append(f"{result['name']}: {result['shared']} bytes of shared memory")
        elif result["spills"]:
            found.append(f"{result['name']}: {result['spills']} spilled")
    return found


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def _spills(compiled: Any) -> int:
    """Bytes on the stack (a kernel that does not spill has none), or spilled AMD registers."""
    if "amdgcn" in compiled.asm:
        counts = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    else:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        counts = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert counts, "no resource usage to read"
    return sum(int(count) for count in counts)


def _compile(specialisation: Any, target: str) -> dict[str, Any]:
    import triton
    from triton.compiler import ASTSource

    from gcfast.kernels.launch import fitting_warps

    kernel, types, constants, options = specialisation
    if "num_warps" in options:
        lanes = _gpu_target(target).warp_size
        options = {**options, "num_warps": fitting_warps(options["num_warps"], lanes)}
    names = kernel.arg_names
    unknown = (set(types) | set(constants)) ^ set(names)
    assert not unknown, f"{kernel.__name__}: {unknown}"
    assert not set(types) & set(constants), kernel.__name__
    kinds = [types.get(name, "constexpr") for name in names]
    signature = {name: kind.removesuffix(":16") for name, kind in zip(names, kinds, strict=True)}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kinds)
        if kind.startswith("*") or kind.endswith(":16")
    }
    shown = ", ".join(f"{k}={v}" for k, v in {**types, **constants, **options}.items())
    result = {"target": target, "name": f"{kernel.__name__}({shown})"}
    try:
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=_gpu_target(target), options=options)
    except Exception as error:  # any of the compiler's own kinds, to be reported with the name
        return {**result, "error": f"{type(error).__name__}: {error}", "shared": 0, "spills": 0}
    shared = compiled.metadata.shared
    return {**result, "error": None, "shared": shared, "spills": _spills(compiled)}


if __name__ == "__main__":
    listed = list(importlib.import_module(sys.argv[1]).specialisations())
    print(json.dumps([_compile(one, target) for one in listed for target in TARGETS]))
