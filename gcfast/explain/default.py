"""The default Explainer of the process: opened by ``load``, used by ``explain_batch``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

from torch import Tensor, nn

from gcfast.database.database import Database
from gcfast.errors import NoDatabaseError
from gcfast.explain.explainer import Explainer
from gcfast.explain.result import Explanation, MapOptions
from gcfast.method.objectives import objective_from

_default: Explainer | None = None


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    reshape: Callable[[Tensor], Tensor] | None = None,
    verify: bool | None = None,
    **settings: Any,
) -> Explainer:
    """Open a database for a model; :func:`explain_batch` uses it from then on.

    Args:
        path: the database's folder.
        model: the network that it was built with.
        reshape: as it was given to the Explainer; it is not stored.
        verify: whether checksums are compared, as for :meth:`Database.open`.
        **settings: of :class:`Explainer`, instead of the stored ones; ``k`` and ``index`` are not
            stored.

    Returns:
        The Explainer, with its database.

    Raises:
        NoDatabaseError, DamagedDatabaseError: as :meth:`Database.open`.
        ModelMismatchError: the model is another one.
        TypeError, ValueError: as :class:`Explainer`.
    """
    global _default
    database = Database.open(path, verify=verify)
    _default = stored_explainer(database, model, reshape=reshape, **settings)
    return _default


def stored_explainer(database: Database, model: nn.Module, **settings: Any) -> Explainer:
    """Make the Explainer of a database, with the settings that are stored in it.

    Args:
        database: an open one.
        model: the network that it was built with.
        **settings: of :class:`Explainer`, instead of the stored ones.

    Raises:
        ModelMismatchError, TypeError, ValueError: as :func:`load`.
    """
    stored = dict(database.manifest["settings"])
    if "objective" in stored:  # class proxies have none
        stored["objective"] = objective_from(stored["objective"])
    return Explainer(model, database=database, **{**stored, **settings})


@overload
def explain_batch(
    images: Tensor, *, details: Literal[False] = ..., **options: Unpack[MapOptions]
) -> Tensor: ...


@overload
def explain_batch(
    images: Tensor, *, details: Literal[True], **options: Unpack[MapOptions]
) -> Explanation: ...


@overload
def explain_batch(
    images: Tensor, *, details: bool, **options: Unpack[MapOptions]
) -> Tensor | Explanation: ...


def explain_batch(
    images: Tensor, *, details: bool = False, **options: Unpack[MapOptions]
) -> Tensor | Explanation:
    """Call :meth:`Explainer.explain_batch` of the Explainer that :func:`load` opened last.

    Raises:
        NoDatabaseError: :func:`load` has not been called.
    """
    if _default is None:
        raise NoDatabaseError("there is no database to explain from: call gcfast.load first")
    return _default.explain_batch(images, details=details, **options)
