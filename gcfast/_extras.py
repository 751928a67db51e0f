"""Optional dependencies, named with the extra that installs them."""

from __future__ import annotations

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
