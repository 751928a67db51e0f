"""Compiling kernels for GPUs that are not there.

Triton compiles for a named target without one, but not in a process where its interpreter is on. So
this file is also a program: ``python offline.py MODULE KERNEL TARGET`` calls
``MODULE.launches(KERNEL)`` with tensors that have no memory, compiles every form of a kernel that
those launches ask for, and prints what it found as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Shared memory that one block may have: CUDA programming guide, table of technical specifications
# by compute capability; AMD CDNA 3 ISA, section 1.2 (LDS).
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = tuple(SHARED_LIMIT_BYTES)
MULTIPROCESSORS = 132  # of an H100 or H200


class Form(NamedTuple):
    """One compiled form of a kernel."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument to Triton's type of it: "*fp32", "i64", "constexpr"
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # pointers and integers that 16 divides
    options: dict[str, Any]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """The kernel and its arguments, for messages."""
        marks = {
            name: kind + ":16" * (name in self.aligned) for name, kind in self.signature.items()
        }
        shown = {**marks, **self.constants, **self.options}
        return f"{self.kernel.__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    def compile(self, target: str, **options: Any) -> Any:
        """Triton's compiled kernel for a target."""
        import triton
        from triton.compiler import ASTSource

        from gcfast.kernels.launch import fitting_stages, fitting_warps

        options = {**self.options, **options}
        lanes = _gpu_target(target).warp_size
        for option, fitting in (("num_warps", fitting_warps), ("num_stages", fitting_stages)):
            if option in options:
                options[option] = fitting(options[option], lanes)
        names = self.kernel.arg_names
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, self.signature, self.constants, attributes)
        return triton.compile(source, target=_gpu_target(target), options=options)


def recorded(module: str, kernel: str) -> list[Form]:
    """The forms of one file's kernels that the launches of a module ask for; nothing runs."""
    import torch
    from torch.overrides import TorchFunctionMode
    from triton.runtime.jit import JITFunction

    from gcfast.kernels import launch

    class OnGpu(TorchFunctionMode):
        """Tensors of the meta device, which have no memory, say that they are on a GPU."""

        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function == torch.Tensor.is_cuda.__get__:
                return True
            return function(*args, **(kwargs or {}))

    forms: dict[str, Form] = {}
    on_device = False

    @contextlib.contextmanager
    def device_of(_: object) -> Iterator[None]:
        nonlocal on_device
        on_device = True
        yield
        on_device = False

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(size > 0 for size in grid), f"an empty grid: {grid}"
        assert on_device, "a launch outside of `with torch.cuda.device_of(...)`"
        assert not warmup
        if self.__module__.rpartition(".")[2] == kernel:
            form = _form(self, args, kwargs)
            forms[form.name] = form

    # One process makes these launches and nothing else, so nothing is put back.
    JITFunction.run = record  # type: ignore[method-assign]
    launch.multiprocessors = lambda _: MULTIPROCESSORS
    torch.cuda.device_of = device_of  # type: ignore[misc,assignment]
    with torch.device("meta"), OnGpu():
        importlib.import_module(module).launches(kernel)
    return list(forms.values())


def _form(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """What Triton's JIT makes of the arguments of one launch."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        is_kept = not parameter.do_not_specialize
        kind = "constexpr" if parameter.is_constexpr else _kind(value, is_kept)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif kind[0] in "*iu" and is_kept:
            place = value.storage_offset() * value.element_size() if kind[0] == "*" else value
            if place % 16 == 0:
                aligned.append(name)
    options = {k: v for k, v in kwargs.items() if k not in names}
    return Form(kernel, signature, constants, tuple(aligned), options)


def _kind(value: Any, is_specialized: bool) -> str:
    from triton.runtime.jit import mangle_type

    if hasattr(value, "storage_offset") or isinstance(value, float | bool):
        return mangle_type(value)
    if value == 1 and is_specialized:
        return "constexpr"
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"


def compile_elsewhere(module: str, kernel: str, target: str, cache: Path) -> list[dict[str, Any]]:
    """What became of each form of a kernel file, compiled by a child process.

    Args:
        module: what to import, with a function ``launches``.
        kernel: its argument, a file of kernels.
        target: what to compile for.
        cache: a folder for Triton's cache.

    Returns:
        Dicts with "name", "error" (or None), "shared" (bytes), "spills" (bytes on the stack, or on
        AMD spilled registers).
    """
    printed = run_elsewhere([__file__, module, kernel, target], cache)
    results: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return results


def run_elsewhere(arguments: list[str], cache: Path) -> str:
    """What Python prints in a process without Triton's interpreter, which can import this file."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    # An empty entry would be the working directory, where `gcfast` is the source tree.
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    done = subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def problems(results: list[dict[str, Any]], target: str, *, spills: int = 0) -> list[str]:
    """One line for each form that does not fit the target, or spills more than so many bytes."""
    found = []
    for result in results:
        if result["error"]:
            found.append(f"{result['name']}: {result['error']}")
        elif result["shared"] > SHARED_LIMIT_BYTES[target]:
            found.append(f"{result['name']}: {result['shared']} bytes of shared memory")
        elif result["spills"] > spills:
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


def attempt(form: Form, target: str) -> dict[str, Any]:
    """What became of one form, as :func:`compile_elsewhere` tells."""
    try:
        compiled = form.compile(target)
    except Exception as error:  # of the compiler's own kinds, to be reported with the name
        return {"name": form.name, "error": f"{type(error).__name__}: {error}"}
    shared = compiled.metadata.shared
    return {"name": form.name, "error": None, "shared": shared, "spills": _spills(compiled)}


if __name__ == "__main__":
    print(json.dumps([attempt(form, sys.argv[3]) for form in recorded(*sys.argv[1:3])]))
