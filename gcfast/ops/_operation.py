"""One declaration an operation: from a typed function all the ways to call it.

A declaration is a function with the operation's signature and docstring. It checks its arguments
and returns :class:`Outputs`: what shapes and dtypes come out. :func:`operation` makes of it

- the public call: checks, then runs, outside autograd and autocast. While ``torch.compile`` traces
  it is one node of the graph;
- ``.trusted``: the same without checks and without leaving autograd and autocast, for the hot path.
  The caller has done both. Nothing waits for the device;
- ``torch.ops.gcfast.<name>``: ``torch.library.custom_op`` with a fake implementation, so that it
  survives ``torch.compile(fullgraph=True)`` and ``torch.export``. It checks shapes and dtypes but
  not values, since reading them waits for the device. Its schema lists every tensor before the
  star, as PyTorch requires.

An operation runs ``launch_<name>`` of ``gcfast/kernels/<name>.py``, the C++ function that its
declaration names, or ``gcfast.reference.<name>``, as ``backend`` says (:mod:`gcfast.ops`). All
take the declared arguments, without ``backend``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from gcfast import reference
from gcfast._checks import require_choice
from gcfast.errors import MissingExtraError
from gcfast.ops.precision import sheltered

BACKENDS = ("auto", "triton", "reference")
OPERATIONS: dict[str, Operation[..., Any]] = {}  # by name, in the order of their declaration

# A schema has lists of any length and no tuples.
_SEQUENCES = {tuple[int, int]: Sequence[int], tuple[int, int] | None: Sequence[int] | None}

P = ParamSpec("P")
R = TypeVar("R")


class Outputs(Generic[R]):
    """What a declaration promises of a result of type R: a tensor, or a tuple of tensors."""

    def __init__(
        self,
        like: Tensor,
        *tensors: tuple[Sequence[int], torch.dtype],
        check_values: Callable[[], None] | None = None,
    ) -> None:
        """Promise tensors.

        Args:
            like: a tensor on the device of the outputs.
            *tensors: the shape and the dtype of each.
            check_values: checks what only a tensor's values tell, which waits for its device. Only
                the public call makes it.
        """
        self._like = like
        self._tensors = tensors
        self.check_values = check_values

    def empty(self) -> Tensor | tuple[Tensor, ...]:
        """Return the tensors unfilled, as a fake implementation does."""
        empty = tuple(self._like.new_empty(shape, dtype=dtype) for shape, dtype in self._tensors)
        return empty if len(empty) > 1 else empty[0]


class Operation(Protocol[P, R]):
    """What :func:`operation` makes: a function with one attribute."""

    __name__: str
    trusted: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments and run."""


def operation(
    *, cpp: Callable[..., Any] | None = None
) -> Callable[[Callable[P, Outputs[R]]], Operation[P, R]]:
    """Make an operation of its declaration.

    Args:
        cpp: the C++ implementation, which "auto" takes for tensors on the CPU.
    """

    def made(declaration: Callable[P, Outputs[R]]) -> Operation[P, R]:
        name = declaration.__name__
        signature = inspect.signature(declaration, eval_str=True)
        (result,) = typing.get_args(signature.return_annotation)
        first_name = next(iter(signature.parameters))
        is_record = hasattr(result, "_fields")  # a NamedTuple of tensors

        def trusted(*args: Any, backend: str = "auto", **kwargs: Any) -> R:
            first = args[0] if args else kwargs[first_name]
            run: Callable[..., R] = getattr(reference, name)
            if uses_triton(backend, first, (*args, *kwargs.values())):
                run = getattr(_kernels(name), f"launch_{name}")
            elif cpp is not None and backend == "auto" and not first.is_cuda:
                run = cpp
            return run(*args, **kwargs)

        @sheltered
        def eager(*args: P.args, **kwargs: P.kwargs) -> R:
            check_values = declaration(*args, **kwargs).check_values
            if check_values is not None:
                check_values()
            return public.trusted(*args, **kwargs)

        @sheltered
        def registered(*args: P.args, **kwargs: P.kwargs) -> Any:
            declaration(*args, **kwargs)
            out: Any = public.trusted(*args, **kwargs)
            return tuple(out) if is_record else out

        def fake(*args: P.args, **kwargs: P.kwargs) -> Any:
            return declaration(*args, **kwargs).empty()

        @functools.wraps(declaration)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                out = node(*args, **kwargs)
                return result(*out) if is_record else out  # type: ignore[no-any-return]
            return eager(*args, **kwargs)

        checked.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        public = cast("Operation[P, R]", checked)
        public.trusted = cast("Callable[P, R]", trusted)
        _register(name, signature, result, registered, fake)
        node: Any = getattr(torch.ops.gcfast, name)
        OPERATIONS[name] = public
        return public

    return made


def _register(
    name: str,
    signature: inspect.Signature,
    result: Any,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Register ``torch.ops.gcfast.<name>``."""
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    moved = [p for p in keywords if p.annotation in (Tensor, Tensor | None)]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *positional,
            *(p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in moved),
            *(
                p.replace(annotation=_SEQUENCES.get(p.annotation, p.annotation))
                for p in keywords
                if p not in moved
            ),
        ],
        return_annotation=tuple[(Tensor,) * len(result._fields)]  # type: ignore[misc]
        if hasattr(result, "_fields")
        else result,
    )
    count, names = len(positional), [p.name for p in moved]

    # PyTorch passes the moved tensors by position, the declaration takes them by name.
    def with_names(function: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:count], **dict(zip(names, args[count:], strict=False)), **kwargs)

        return named

    registered = torch.library.custom_op(
        f"gcfast::{name}",
        with_names(run),
        mutates_args=(),
        schema=torch.library.infer_schema(prototype, mutates_args=()),
    )
    registered.register_fake(with_names(fake))


def uses_triton(backend: str, first: Tensor, arguments: Sequence[object]) -> bool:
    """Return whether the kernels run on these arguments.

    "auto" takes them for tensors on a GPU where Triton is installed, unless one is float64, which
    the kernels do not compute in. Nothing here waits for the device.

    Args:
        backend: "auto", "triton" or "reference".
        first: the operation's first argument, which decides the device.
        arguments: all of them.

    Raises:
        MissingExtraError: "triton" is not installed.
        ValueError: an unknown backend; "triton" for float64, or for tensors that are not on a GPU
            while Triton's interpreter is off.
    """
    if backend == "reference":
        return False
    if backend == "auto" and not first.is_cuda:
        return False
    double = [a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.float64]
    if backend == "auto":
        return not double and triton_installed()
    require_choice("backend", backend, BACKENDS)
    if not triton_installed():
        raise MissingExtraError(
            "`backend` 'triton' needs Triton, which is not installed: pip install 'gcfast[gpu]'"
        )
    if double:
        raise ValueError(
            "`backend` must be 'auto' or 'reference' for float64 tensors, got 'triton'"
        )
    if not first.is_cuda and not _interpreting():
        raise ValueError(
            f"`backend` must be 'auto' or 'reference' for tensors on {first.device}, got 'triton': "
            "its kernels run on a GPU, or interpreted where TRITON_INTERPRET=1 was set"
        )
    return True


@functools.cache
def triton_installed() -> bool:
    """Return whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"gcfast.kernels.{name}")
