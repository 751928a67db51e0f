"""Building a database: one forward pass over the images, then the rows.

Stage 1 runs the model once over the loader and spools each image's embedding and label (and, for
the closed form, its norm and pooled activations). Stage 2 draws each row's triplets from the whole
spool and turns their cotangents into grad-weights: from the spool alone where the head allows the
closed form, with a second pass over the loader where it does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gcfast._checks import require_choice
from gcfast.builder.describe import describe, identity, report_of
from gcfast.builder.embed import Embedded, embed_all
from gcfast.builder.resumable import build_into
from gcfast.builder.rows import Rows, rows_from_second_pass, rows_from_spool
from gcfast.database.database import Database
from gcfast.database.manifest import STORAGES
from gcfast.method.settings import Settings
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
    """Both stages; see :meth:`gcfast.Explainer.build`."""
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
    embedded = embed_all(
        network,
        loader,
        l2_normalize=settings.l2_normalize,
        keep_pooled=settings.method == "gradcam++",
        progress=progress,
        channels=settings.channels,
        one_pass=isinstance(loader, Iterator),
        spool_bytes=spool_bytes,
        real_labels=settings.objective.real_labels,
    )
    if embedded.head is not None:
        rows = rows_from_spool(embedded, settings, progress=progress)
    else:
        rows = rows_from_second_pass(network, loader, embedded, settings, progress=progress)
    return assemble(network, embedded, rows, settings, preprocessing).in_storage(storage)


def assemble(
    network: Network,
    embedded: Embedded,
    rows: Rows,
    settings: Settings,
    preprocessing: dict[str, Any] | None,
) -> Database:
    """The database of the rows made, with its manifest.

    Raises:
        ValueError: no row has a triplet.
    """
    tensors, kept = rows.tensors()
    hardest = int((tensors["triplet_counts"] == 0).sum())
    report = report_of(embedded.labels, len(kept), hardest, settings)
    same = identity(network, settings, preprocessing, "float32")
    everything = len(kept) == len(embedded.ids)
    ids = list(embedded.ids) if everything else [embedded.ids[i] for i in kept.tolist()]
    return Database(tensors, ids, describe(network, embedded, same, report))
