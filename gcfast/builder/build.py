"""Building a database: one forward pass over the images, then the rows.

Stage 1 (:mod:`gcfast.builder.embed`) runs the model once over the loader and spools each image's
embedding and label (and, for the closed form, its norm and pooled activations). Stage 2
(:mod:`gcfast.builder.rows`) draws each row's triplets from the whole spool and turns their
cotangents into grad-weights: from the spool alone where the head allows the closed form, with a
second pass over the loader where it does not.

The rows go to memory (here), to a folder as they are made (:mod:`gcfast.builder.resumable`) or to a
database that has some already (:mod:`gcfast.builder.append`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from gcfast._checks import require_choice
from gcfast.builder.describe import describe, identity, report_of, zero_rows
from gcfast.builder.embed import Embedded, embed
from gcfast.builder.resumable import build_into
from gcfast.builder.rows import Rows
from gcfast.builder.spool import Spool
from gcfast.database.database import Database
from gcfast.database.manifest import STORAGES
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import fingerprint, with_outputs
from gcfast.model.network import Network


def build(
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
    preprocessing: dict[str, Any] | None = None,
    spool_bytes: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    storage: str = "float32",
) -> Database:
    """Build a database; see :meth:`gcfast.Explainer.build`."""
    require_choice("storage", storage, STORAGES)
    try:
        json.dumps(preprocessing)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`preprocessing` must be what JSON can hold: {error}") from None
    if out is not None:
        return build_into(
            Path(out).absolute(),
            network,
            loader,
            settings,
            identity(network, settings, preprocessing, storage),
            progress=progress,
            resume=resume,
            overwrite=overwrite,
        )
    for name, value in (("resume", resume), ("overwrite", overwrite)):
        if value:
            raise ValueError(f"`{name}` must be False without `out`, got {value!r}")
    # A model's tensors take as long to hash as some batches to embed, and need no interpreter.
    with ThreadPoolExecutor(1) as beside:
        model = beside.submit(fingerprint, network.model)
        embedded = embed(network, loader, settings, progress=progress, spool=Spool(spool_bytes))
        database, _ = in_memory(
            network, loader, embedded, settings, preprocessing, model=model, progress=progress
        )
    return database.in_storage(storage)


def in_memory(
    network: Network,
    loader: Iterable[Any],
    embedded: Embedded,
    settings: Settings,
    preprocessing: dict[str, Any] | None = None,
    *,
    model: Future[dict[str, Any]] | None = None,
    progress: bool = False,
) -> tuple[Database, Tensor]:
    """Make the rows of a database in memory.

    Args:
        network: the model and its layer.
        loader: as for :meth:`gcfast.builder.rows.Rows.made`.
        embedded: the results of stage 1.
        settings: of the rows.
        preprocessing: for the manifest.
        model: the model's fingerprint, if it is being made.
        progress: show a bar on stderr.

    Returns:
        (the database, [N] int64: the number of each row's image).

    Raises:
        ValueError: no row has a triplet, or all weights are zero; as
            :meth:`gcfast.builder.rows.Rows.made`.
    """
    parts = list(Rows(network, embedded, settings).made(loader, progress=progress))
    hardest = sum(int((part.rows.triplet_counts == 0).sum()) for part in parts)
    zero = sum(zero_rows(part.rows.weights) for part in parts)
    rows = sum(len(part.ids) for part in parts)
    estimated = sum(part.estimated for part in parts)
    classes = embedded.classes()
    if classes is not None:
        zero = rows - int(classes.counts.sum())
    report = report_of(
        embedded.labels, rows, hardest, estimated, zero, settings, alone=embedded.alone
    )
    (made,) = parts
    # The fixed images go through the model while its tensors are still being hashed.
    outputs = {} if model is None else with_outputs({}, network)
    known = None if model is None else model.result() | outputs
    same = identity(network, settings, preprocessing, "float32", model=known)
    manifest = describe(network, embedded, same, report)
    return Database(made.rows._asdict(), made.ids, manifest, classes=classes), made.images
