"""Functions of the user's, by name: ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from gcfast.errors import GcfastError


class NamedFunctionError(GcfastError):
    """The module of a function could not be imported."""


def named_function(spec: str, argument: str) -> Callable[..., Any]:
    """Import ``package.module:function``; the working directory is searched first.

    Args:
        spec: what to import.
        argument: the argument that it was given as, for errors.

    Raises:
        ValueError: there is no such module or function.
        NamedFunctionError: importing the module fails.
    """
    where, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"`{argument}` must be package.module:function, got {spec!r}")
    here = os.getcwd()
    # As with ``python -m``, the user's own files are found as well as the installed packages. The
    # entry stays, since the function may import more later.
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    if where not in sys.modules:  # called for each picture
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        # The user's module may exist and import one that does not: that is another error.
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise ValueError(
                f"`{argument}` must name a module that can be imported, found no {error.name} in "
                f"{here} or among the installed packages"
            ) from error
        raise NamedFunctionError(f"importing {where} failed: {told(error)}") from error
    except Exception as error:
        raise NamedFunctionError(f"importing {where} failed: {told(error)}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(name, names) or sorted(names)[:5]
        raise ValueError(
            f"`{argument}` must name a function of {where}, it has no {name or 'empty name'}"
            + (f" (but {', '.join(close)})" if close else "")
        )
    return function


def told(error: BaseException) -> str:
    """Return an error of other code in one line, with the place it came from."""
    text = " ".join(str(error).split()) or "no reason given"
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" ({os.path.basename(last.filename)}, line {last.lineno})" if last else ""
    return f"{type(error).__name__}: {text}{place}"
