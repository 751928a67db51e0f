"""Building a database: one forward pass over the images, then the rows.

Stage 1 runs the model once over the loader and spools each image's embedding and label (and, for
the closed form, its norm and pooled activations). Stage 2 draws each row's triplets from the whole
spool and turns their cotangents into grad-weights: from the spool alone where the head allows the
closed form, with a second pass over the loader where it does not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gcfast.database import Database
from gcfast.embedding import Embedded, embed_all
from gcfast.fingerprint import fingerprint
from gcfast.manifest import FORMAT, FORMAT_VERSION
from gcfast.network import Network
from gcfast.rows import Rows, rows_from_second_pass, rows_from_spool
from gcfast.settings import Settings


def build(
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    *,
    progress: bool = False,
    preprocessing: dict[str, Any] | None = None,
    spool_bytes: int | None = None,
) -> Database:
    """Both stages; see :meth:`gcfast.Explainer.build`."""
    try:
        json.dumps(preprocessing)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`preprocessing` must be what JSON can hold: {error}") from None
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
    return assemble(network, embedded, rows, settings, preprocessing)


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
    seen = Counter(embedded.labels.tolist())
    needs_positive = settings.objective.pairs in ("triplet", "positive")
    single = torch.tensor(
        [needs_positive and seen[label] == 1 for label in embedded.labels.tolist()]
    )
    dropped = torch.ones(len(embedded.ids), dtype=torch.bool)
    dropped[kept] = False
    report = {
        "images": len(embedded.ids),
        "rows": len(kept),
        "skipped_single": int((single & dropped).sum()),
        "skipped_no_triplet": int((dropped & ~single).sum()),
        "hardest_triplet": rows.fallbacks,
    }
    if len(kept) == 0:
        raise ValueError(
            f"`loader` must give images with valid triplets, got none: {report['skipped_single']} "
            f"of {report['images']} labels were seen once, {report['skipped_no_triplet']} images "
            "had no valid triplet"
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(network.model),
        "layer": network.layer_name,
        "settings": {**settings.describe(), "output_key": network.output_key},
        "closed_form": embedded.head is not None,
        "storage": "float32",
        "channels_last": network.channels_last,
        "embedding_dim": tensors["embeddings"].shape[1],
        "layer_channels": len(embedded.mean_activation),
        "class_names": embedded.class_names,
        "report": report,
        "preprocessing": preprocessing,
        "mean_activation": embedded.mean_activation.tolist(),
    }
    return Database(tensors, [embedded.ids[i] for i in kept.tolist()], manifest)
