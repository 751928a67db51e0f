"""What a manifest says of a build: the model, the settings, and the counts."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
from torch import Tensor

from gcfast.builder.embed import Embedded
from gcfast.database.manifest import FORMAT, FORMAT_VERSION
from gcfast.method.pairs import DRAWS
from gcfast.method.settings import ELEMENTWISE, Settings
from gcfast.model.fingerprint import fingerprint, with_outputs
from gcfast.model.network import Network


def identity(
    network: Network,
    settings: Settings,
    preprocessing: dict[str, Any] | None,
    storage: str,
    *,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what builds that differ only in their images have in common; for the manifest.

    Args:
        network: the model and its layer.
        settings: of the rows.
        preprocessing: for the manifest.
        storage: of the rows.
        model: the model's fingerprint; None makes it.
    """
    return {
        "fingerprint": fingerprint(network.model) if model is None else model,
        "layer": network.layer_name,
        "settings": {**settings.describe(), "output_key": network.output_key},
        "draws": DRAWS,
        "preprocessing": preprocessing,
        "storage": storage,
    }


def changed_settings(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a few words for each setting that has changed since a build."""
    now = json.loads(json.dumps(now))
    return [
        f"{key} was {was!r}, is {now.get(key)!r}"
        for key, was in stored.items()
        if was != now.get(key)
    ]


def changed_draws(stored: dict[str, Any], settings: Settings) -> str:
    """In words, that triplets were drawn by other rules than now; empty where none are drawn.

    Args:
        stored: a manifest, or the state of an unfinished build.
        settings: of the rows.
    """
    before = stored.get("draws", 1)
    if settings.is_proxy or settings.triplets == "all" or before == DRAWS:
        return ""
    return (
        f"triplets of the stored rows were drawn by the rules of version {before}, and this gcfast "
        f"draws by version {DRAWS}"
    )


def zero_rows(weights: Tensor) -> int:
    """Return how many rows of weights [n, M] are zero throughout: such a row's map is empty.

    Rows of class proxies have no weights of their own: their classes count those that are zero.
    """
    return int((weights == 0).all(1).sum()) if weights.shape[1] else 0


def report_of(
    labels: Tensor,
    rows: int,
    hardest: int,
    estimated: int,
    zero: int,
    settings: Settings,
    *,
    alone: Tensor | None = None,
) -> dict[str, int]:
    """Return the counts of a build.

    Args:
        labels: [N], of the images.
        rows: how many of them have a row.
        hardest: how many of those took their hardest triplet.
        estimated: how many of those have an estimate for the number of their valid triplets.
        zero: how many of those have no weight but 0.
        settings: of the build.
        alone: [N] bool, images whose label is seen once; None for those of ``labels``.

    Raises:
        ValueError: no row.
    """
    if settings.is_proxy:
        return {"images": len(labels), "rows": rows, "zero_rows": zero}
    single = 0
    if settings.objective.pairs in ("triplet", "positive"):
        if alone is None:
            _, seen = np.unique(labels.numpy(), return_counts=True)
            single = int((seen == 1).sum())
        else:
            single = int(alone.sum())
    report = {
        "images": len(labels),
        "rows": rows,
        # Without a positive there is no triplet, and so no row.
        "skipped_single": single,
        "skipped_no_triplet": len(labels) - rows - single,
        "hardest_triplet": hardest,
        "estimated_counts": estimated,
        "zero_rows": zero,
    }
    if rows == 0:
        raise ValueError(
            f"`loader` must give images with valid triplets, got none: {report['skipped_single']} "
            f"of {report['images']} labels were seen once, {report['skipped_no_triplet']} images "
            "had no valid triplet"
        )
    return report


def describe(
    network: Network, embedded: Embedded, same: dict[str, Any], report: dict[str, int]
) -> dict[str, Any]:
    """Return the manifest of a database, without its shards.

    Args:
        network: the model, its layer known.
        embedded: the results of stage 1.
        same: of :func:`identity`.
        report: of :func:`report_of`.

    Raises:
        ValueError: the weights of all the rows are zero.
    """
    rows, zero = report["rows"], report["zero_rows"]
    what, why = "weights", "the embedding's gradient does not reach the layer {} at its places"
    if embedded.directions is not None:
        what, why = "mean activations", "the layer {} gives nothing at its places"
    what_to_do = (
        f"{why.format(repr(network.layer_name))}; "
        "take another one (gcfast.layers(model, images) lists them), or check `reshape`"
    )
    if same["settings"].get("method") == ELEMENTWISE:
        what, what_to_do = "cotangents", "the objective has no gradient at their triplets"
    if zero == rows:
        raise ValueError(f"the {what} of all {rows} rows are zero: {what_to_do}")
    if zero > rows / 2:
        warnings.warn(f"the {what} of {zero} of {rows} rows are zero: {what_to_do}", stacklevel=2)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": with_outputs(same["fingerprint"], network),
        "layer": network.layer_name,
        "settings": same["settings"],
        "draws": same["draws"],
        "closed_form": embedded.head is not None,
        "storage": same["storage"],
        "channels_last": network.channels_last,
        "embedding_dim": embedded.embeddings.shape[1],
        "layer_channels": len(embedded.mean_activation),
        "class_names": embedded.class_names,
        "report": report,
        "preprocessing": same["preprocessing"],
        "mean_activation": embedded.mean_activation.tolist(),
    }
