"""Rows whose images are given once more: what is taken out of class sums, or moved within them.

A database of class proxies keeps one vector a class, and not what each row added to it. That is
computed anew from the row's image, which must give the embedding that is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast.builder.embed import SAME_IMAGE_TOLERANCE
from gcfast.builder.loader import batches, check_embeddings, on_device
from gcfast.database.database import Database
from gcfast.database.edit import row_numbers
from gcfast.method.head import normalized
from gcfast.method.proxies import directions
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import check_model
from gcfast.model.network import Network


class Reread(NamedTuple):
    """Images of rows, after one forward pass, in the loader's order."""

    ids: list[str]
    labels: list[Any]  # as the loader has them
    directions: Tensor  # [n, C] float32


def reread(
    database: Database, network: Network, loader: Iterable[Any], settings: Settings
) -> Reread:
    """Run the model on images of rows, and check that they are theirs.

    Args:
        database: whose rows.
        network: the model and its layer.
        loader: as for :meth:`gcfast.Explainer.build`, with ids.
        settings: of the explainer.

    Raises:
        ModelMismatchError: the model has changed since the database was built.
        TypeError, ValueError: a loader that gives something else, no ids, ids of no row, or an
            image with another embedding than its row's.
        GcfastError: a compressed database.
    """
    check_model(database.manifest["fingerprint"], network)
    ids: list[str] = []
    labels: list[Any] = []
    embedded: list[Tensor] = []
    directed: list[Tensor] = []
    first = 0
    for batch in batches(loader, real_labels=settings.objective.real_labels):
        if batch.ids is None:
            raise ValueError(
                "`loader` must give (images, labels, ids), got no ids to say whose rows they are"
            )
        images = on_device(batch.images, network)
        captured = network.embed(images)
        embeddings = normalized(captured.output, settings.l2_normalize).cpu()
        check_embeddings(embeddings, images, first=first)
        embedded.append(embeddings)
        directed.append(directions(captured.activations.float().mean((2, 3))).cpu())
        ids += batch.ids
        labels += batch.labels
        first += len(images)
    rows = row_numbers(database, ids)
    for row, name, embedding in zip(rows, ids, torch.cat(embedded), strict=True):
        stored = database.rows(row, row + 1).embeddings[0].float()
        if float((embedding - stored).norm()) > SAME_IMAGE_TOLERANCE * float(stored.norm()):
            raise ValueError(
                f"`loader` must give the images of the rows, got another one for {name!r}: its "
                f"embedding differs from that of row {row}"
            )
    return Reread(ids, labels, torch.cat(directed))
