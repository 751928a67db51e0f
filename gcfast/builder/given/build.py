"""A database from embeddings that exist already: only a few images go through the model.

For the common head u = W mean(A) + b, f = u / |u|, a row's grad-weights are
W^T (c - f <f, c>) / (|u| P), c being the mean gradient of the loss with respect to f. All of it but
|u| and P follows from the embeddings, and these two are a positive factor of the row: its channels,
their order and the normalized map of one neighbor do not depend on it. With method="elementwise"
a row is c itself, whatever the head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast._checks import listed, require_choice, require_finite_rows
from gcfast.builder.build import in_memory
from gcfast.builder.embed import Embedded
from gcfast.builder.given.made_labels import MadeLabels, is_made, make_labels
from gcfast.builder.given.on_demand import on_demand
from gcfast.builder.given.sample import Checked, Sample, checked_images, look_at
from gcfast.builder.given.vectors import Vectors, floats, read_vectors
from gcfast.builder.loader import listed_ids
from gcfast.database.database import Database
from gcfast.database.ids import repeated
from gcfast.database.manifest import MADE_LABELS, RELATIVE, STORAGES
from gcfast.database.write import check_target
from gcfast.method.head import AffineHead, normalized
from gcfast.method.labels import Labels, Values, column
from gcfast.method.proxies import directions
from gcfast.method.settings import ELEMENTWISE, Settings
from gcfast.model.network import Network

UNIT_TOLERANCE = 1e-5  # of |f|: float32 is within 1e-6, float16 is not
COMPRESSED_TOLERANCE = 0.2  # of |f|, the median: one bit a component of PQ makes 0.11 of it
ROWS_AT_ONCE = 16_384


class Given(NamedTuple):
    """The columns of :meth:`gcfast.Explainer.build_from_embeddings`, as they came."""

    embeddings: Any
    labels: Any
    ids: Any = None
    norms: Any = None
    pooled: Any = None


def build_from_embeddings(
    network: Network,
    given: Given,
    settings: Settings,
    *,
    sample: Any,
    check: Any,
    min_cosine: float,
    preprocessing: dict[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    storage: str = "float32",
    rows: str = "all",
    progress: bool = False,
) -> Database:
    """Build a database; see :meth:`gcfast.Explainer.build_from_embeddings`."""
    require_choice("storage", storage, STORAGES)
    require_choice("rows", rows, ("all", "on-demand"))
    if isinstance(min_cosine, bool) or not isinstance(min_cosine, int | float):
        raise TypeError(f"`min_cosine` must be a number, got {min_cosine!r}")
    if not -1 <= min_cosine <= 1:
        raise ValueError(f"`min_cosine` must be from -1 to 1, got {min_cosine}")
    if rows == "on-demand" and (out is not None or storage != "float32"):
        raise ValueError(
            "`rows` must be 'all' with `out` or storage='float16', got 'on-demand': such a "
            "database is in memory, and its save() makes all rows"
        )
    if out is not None:
        check_target(Path(out).absolute(), overwrite=overwrite, resume=False, name="out")
    elif overwrite:
        raise ValueError("`overwrite` must be False without `out`, got True")
    embedded, manifest = _embedded(network, given, settings, sample, check, min_cosine)
    if rows == "on-demand":
        lazy = on_demand(network, embedded, settings, preprocessing)
        lazy.manifest = lazy.manifest | manifest
        return lazy
    database, _ = in_memory(network, (), embedded, settings, preprocessing, progress=progress)
    database.manifest = database.manifest | manifest
    database = database.in_storage(storage)
    if out is None:
        return database
    database.save(out, overwrite=overwrite)
    return Database.open(out, verify=False)


def _embedded(
    network: Network, given: Given, settings: Settings, sample: Any, check: Any, min_cosine: float
) -> tuple[Embedded, dict[str, Any]]:
    """Return what stage 1 of a build gives, and what the manifest says of where it is from."""
    if settings.method not in ("gradcam", ELEMENTWISE) and given.pooled is None:
        raise ValueError(
            f"`pooled` must be given for method={settings.method!r}, which needs each image's "
            "activations averaged over space [N, C]: method='gradcam' and 'elementwise' do without"
        )
    vectors = read_vectors(given.embeddings)
    ids = _ids(given.ids, vectors)
    images, rows = _check_rows(check, ids, vectors)
    made: MadeLabels | None = None
    if not is_made(given.labels):
        numbers, names = _labels(given.labels, ids, vectors, settings)
    seen = look_at(network, sample, settings)
    N, D = vectors.table.shape
    checked = checked_images(network, images, rows, settings, D)

    lengths = vectors.table.norm(dim=1)
    table = vectors.table
    if settings.l2_normalize:
        if not bool((lengths > 0).all()):
            zero = int((lengths <= 0).nonzero()[0])
            raise ValueError(f"`embeddings` must not be zero, got zeros in row {zero}")
        far = (lengths - 1).abs() > UNIT_TOLERANCE
        if bool(far.any()):  # unit vectors keep their bits
            table = torch.where(far[:, None], normalized(table, True), table)
    lowest = checked.compare(table, min_cosine, lengths=not settings.l2_normalize)

    if is_made(given.labels):
        made = make_labels(given.labels, table, settings)
        numbers, names = made.numbers, made.names
    pooled = None if given.pooled is None else floats("pooled", given.pooled, "N C")
    if pooled is not None:
        _require_count("pooled", len(pooled), N)
        require_finite_rows("pooled", pooled)
        checked.compare_pooled(pooled)
    norms, absolute = _norms(given, settings, seen, checked, pooled, table, lengths)
    mean = seen.mean_activation
    if pooled is not None:
        mean = (
            torch.stack([p.double().sum(0) for p in torch.split(pooled, ROWS_AT_ONCE)]).sum(0) / N
        )
    embedded = Embedded(
        embeddings=table,
        labels=numbers,
        ids=ids,
        class_names=names,
        norms=norms,
        pixels=torch.full((N,), seen.pixels),
        pooled=pooled if settings.method == "gradcam++" else None,
        mean_activation=mean,
        head=seen.head,
        directions=directions(pooled) if settings.is_proxy and pooled is not None else None,
        neighbors=None if made is None else made.neighbors,
    )
    made_of = {"source": vectors.source, "checked": len(rows), "lowest_cosine": lowest}
    manifest: dict[str, Any] = {"from_embeddings": made_of}
    if made is not None:
        manifest[MADE_LABELS] = made.described
    if not absolute:
        manifest[RELATIVE] = True
    return embedded, manifest


def _norms(
    given: Given,
    settings: Settings,
    seen: Sample,
    checked: Checked,
    pooled: Tensor | None,
    table: Tensor,
    lengths: Tensor,
) -> tuple[Tensor | None, bool]:
    """Return |u| [N] of the rows, ones where it is unknown; and whether rows have their scale."""
    if settings.without_channels:
        return None, True
    head = seen.head
    assert head is not None
    if pooled is not None:
        return _of_pooled(head, pooled, table, seen.precision), seen.one_size
    ones = torch.ones(len(table))
    if given.norms is not None:
        norms = floats("norms", given.norms, "N")
        _require_count("norms", len(norms), len(table))
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError("`norms` must be finite and positive, the length |u| of each image")
        scale = checked.scale_of(norms, head) if head.unit else 1.0
        if scale is None:
            raise ValueError(
                "`norms` must be the lengths |u| of the embeddings before they were normalized, "
                "and those of the images of `check` are not, nor a multiple: leave them out"
            )
        return (norms * scale if scale != 1 else norms) if head.unit else ones, seen.one_size
    if not head.unit:
        return ones, seen.one_size
    # Vectors that nobody has normalized say it themselves. Unit vectors that were compressed are
    # nearly as long as each other, so that a few images could agree with them by chance.
    from_unit = (lengths - 1).abs()
    if bool((from_unit > UNIT_TOLERANCE).any()):
        scale = checked.scale_of(lengths, head)
        compressed = float(from_unit.median()) <= COMPRESSED_TOLERANCE
        if scale is not None and not (compressed and scale != 1):
            return (lengths * scale if scale != 1 else lengths), seen.one_size
    return ones, False


def _of_pooled(head: AffineHead, pooled: Tensor, table: Tensor, precision: torch.dtype) -> Tensor:
    """Return |u| [N] of pooled activations; ValueError where the embeddings are not theirs."""
    norms, first = [], 0
    for part in torch.split(pooled, ROWS_AT_ONCE):
        rows = table[first : first + len(part)].to(head.weight.device)
        found, agreed = head.norms_and_agreement(part.to(rows.device), rows, precision)
        if not bool(agreed):
            raise ValueError(
                "`pooled` must be the activations that the embeddings were made of, and the "
                f"model's head makes others of them in rows {first} to {first + len(part) - 1}"
            )
        norms.append(found.cpu())
        first += len(part)
    return torch.cat(norms)


def _ids(ids: Any, vectors: Vectors) -> Sequence[str]:
    """Return the rows' ids: those given, or an index's own, or the rows' numbers."""
    N = len(vectors.table)
    if ids is None:
        numbers = range(N) if vectors.numbers is None else vectors.numbers.tolist()
        return [str(number) for number in numbers]
    names = ids.tolist() if hasattr(ids, "tolist") else ids
    listed_names = listed_ids(names, len(names) if hasattr(names, "__len__") else N)
    _require_count("ids", len(listed_names), N)
    twice = repeated(listed_names)
    if twice is not None:
        raise ValueError(f"`ids` must be unique, got {twice[0]!r} twice")
    return listed_names


def _check_rows(check: Any, ids: Sequence[str], vectors: Vectors) -> tuple[Any, Tensor]:
    """Return the images of ``check`` and the numbers of their rows [n]."""
    if not isinstance(check, tuple | list) or len(check) != 2:
        raise TypeError(
            "`check` must be (images, rows): some images [n, 3, h, w] and which row each has, "
            f"got {type(check).__name__}"
        )
    images, rows = check
    rows = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    if rows and all(isinstance(row, str) for row in rows):
        places = {name: place for place, name in enumerate(ids)}
    elif all(isinstance(row, int) and not isinstance(row, bool) for row in rows):
        known = range(len(ids)) if vectors.numbers is None else vectors.numbers.tolist()
        places = {number: place for place, number in enumerate(known)}
    else:
        raise TypeError(f"`check` must name rows by number, or all by id, got {rows[:3]!r}")
    missing = [row for row in rows if row not in places]
    if missing:
        raise ValueError(f"`check` must name rows that there are, got {listed(missing)}")
    return images, torch.tensor([places[row] for row in rows], dtype=torch.int64)


def _labels(
    labels: Any, ids: Sequence[str], vectors: Vectors, settings: Settings
) -> tuple[Tensor, list[str]]:
    """Return the rows' labels [N] and the names of the classes."""
    real = settings.objective.real_labels
    if labels is None:
        raise ValueError(
            "`labels` must be given, one a row, since triplets are drawn by them, or "
            "'kmeans:1000' or 'neighbors' where there are none"
        )
    if isinstance(labels, Mapping):
        keys = ids if vectors.numbers is None else vectors.numbers.tolist()
        missing = [key for key in keys if key not in labels]
        if missing:
            raise ValueError(f"`labels` must have every row, and lacks {listed(missing)}")
        labels = [labels[key] for key in keys]
    elif vectors.numbers is not None:
        raise ValueError(
            "`labels` must be a mapping from the index's ids to labels for an index whose ids are "
            "not 0 to N - 1 (a list could be in any order)"
        )
    listed_labels = (Values if real else Labels).listed(labels, len(ids))
    known = column(real)
    numbers = known.add(listed_labels)  # type: ignore[arg-type]
    known.require_two()
    return numbers, known.names


def _require_count(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"`{name}` must have one for each of the {wanted} embeddings, got {got}")
