"""Optional dependencies, named with the extra that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gcfast.errors import MissingExtraError


def import_faiss(what: str) -> Any:
    """The module ``faiss``, for the argument or function of this name.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            f"`{what}` needs FAISS, which is not installed: pip install 'gcfast[cpu]' "
            "(or 'gcfast[gpu]')"
        ) from error
    return faiss


@contextmanager
def needs_extra(extra: str, module: str) -> Iterator[None]:
    """Import a library inside the block that an optional module of gcfast is for.

    Args:
        extra: what installs the library.
        module: the module of gcfast.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # the library is there, and says why it does not work
            raise
        raise MissingExtraError(
            f"`{module}` needs {error.name}, which is not installed: pip install 'gcfast[{extra}]'"
        ) from error


def import_ray(what: str) -> Any:
    """The module ``ray`` with ``ray.data``, for the function or option of this name.

    Raises:
        MissingExtraError: it is not installed, or is older than 2.60.
    """
    with needs_extra("ray", what):
        import ray.data
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < (2, 60):
        raise MissingExtraError(
            f"`{what}` needs ray 2.60 or later, {ray.__version__} is installed: "
            "pip install 'gcfast[ray]'"
        )
    return ray
