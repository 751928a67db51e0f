"""Changing a database's rows without the model: removing, relabelling and merging them.

The triplets of the rows that stay were drawn from other images or labels than the database has
afterwards, so all of them count as ``older_rows``; ``Explainer.rebuild`` renews them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gcfast._checks import listed
from gcfast.database.float16 import in_storage
from gcfast.database.ids import repeated
from gcfast.database.manifest import CALIBRATION, RELATIVE, require_same_rows
from gcfast.database.shards import Shard
from gcfast.database.write import (
    CLASSES,
    commit,
    disk_errors,
    next_number,
    write_shard,
    write_tensors,
    writing,
)
from gcfast.errors import GcfastError, ModelMismatchError
from gcfast.method.labels import column
from gcfast.method.proxies import Classes
from gcfast.model.fingerprint import difference, outputs_differ

if TYPE_CHECKING:
    from gcfast.database.database import Database

IDS_AT_ONCE = 65_536
OF_THE_ROWS = ("index", CALIBRATION)  # entries of a manifest that hold for its rows alone


class Change(NamedTuple):
    """What becomes of a database's rows."""

    kept: Tensor  # [N] bool
    labels: Tensor  # [N], of all of them
    manifest: dict[str, Any]  # its entries that change
    dropped: tuple[str, ...]  # and those that no longer hold
    classes: Classes | None  # of class proxies, afterwards


class Parts(NamedTuple):
    """A database in memory."""

    shards: list[Shard]
    ids: list[str]
    manifest: dict[str, Any]


def removal(database: Database, ids: Iterable[str], directions: Tensor | None = None) -> Change:
    """Return the change that :meth:`gcfast.Database.remove` makes.

    Args:
        database: as it is.
        ids: of the rows that go.
        directions: [n, C] float32, of :func:`gcfast.method.proxies.directions`, of each of them;
            None where they are not known.
    """
    names = _names(ids, "ids")
    places = _places(database, names)
    kept = torch.ones(len(database), dtype=torch.bool)
    kept[places] = False
    if not kept.any():
        raise ValueError(
            f"`ids` must leave a row, got the ids of all {len(database)}: delete the folder instead"
        )
    labels = torch.cat([shard.labels for shard in database.shards])
    report = database.report
    gone: dict[str, Callable[[Shard], Tensor]] = {
        "rows": lambda row: torch.ones(len(row.labels), dtype=torch.bool),
        "hardest_triplet": lambda row: row.triplet_counts == 0,
        "zero_rows": lambda row: (row.weights == 0).all(1),
    }
    for shard, (start, stop) in _ranges(database):
        rows = Shard(*(values[~kept[start:stop]] for values in shard))
        for name, is_one in gone.items():
            if name in report:
                report[name] -= int(is_one(rows).sum())
    report["removed"] = report.get("removed", 0) + len(places)
    changes: dict[str, Any] = {"report": report}
    classes = database.classes
    if classes is None:
        changes["older_rows"] = int(kept.sum())
    else:
        if directions is not None:
            rows_of = _in_order(database, places, names, directions)
            classes = classes.minus(Classes.of(rows_of, labels[places]))
        else:
            _as_classes(database, labels, kept.long(), "remove")
        classes = classes.only(labels[kept])
        report["zero_rows"] = int(kept.sum() - classes.counts.sum())
    return Change(kept, labels, changes, OF_THE_ROWS, classes)


def relabelling(
    database: Database, labels: Mapping[str, Any], directions: Tensor | None = None
) -> Change:
    """Return the change that :meth:`gcfast.Database.relabel` makes.

    Args:
        database: as it is.
        labels: the new label of each id.
        directions: as for :func:`removal`, in the order of ``labels``.
    """
    if not isinstance(labels, Mapping):
        raise TypeError(f"`labels` must map ids to labels, got {type(labels).__name__}")
    names = _names(labels, "labels")
    before = torch.cat([shard.labels for shard in database.shards])
    numbers = column(before.is_floating_point(), database.class_names, before[:1].tolist())
    given = numbers.listed(list(labels.values()), len(labels))
    wanted = dict(zip(names, numbers.add(given).tolist(), strict=True))  # type: ignore[arg-type]
    places, now = _places(database, names), before.clone()
    now[places] = torch.tensor([wanted[database.ids[at]] for at in places], dtype=now.dtype)
    changes: dict[str, Any] = {"class_names": numbers.names}
    classes = database.classes
    if classes is None:
        changes["older_rows"] = len(database)
    elif directions is not None:
        rows = _in_order(database, places, names, directions)
        classes = classes.minus(Classes.of(rows, before[places]))
        classes = classes.plus(Classes.of(rows, now[places])).only(now)
    else:
        classes = classes.renamed(_as_classes(database, before, now, "relabel"))
    return Change(torch.ones(len(now), dtype=torch.bool), now, changes, (CALIBRATION,), classes)


def row_numbers(database: Database, ids: Iterable[str]) -> list[int]:
    """Return the number of the row of each id, in their order.

    Raises:
        TypeError, ValueError: ids that are no strings, come twice or are of no row.
        GcfastError: a compressed database.
    """
    names = _names(ids, "ids")
    numbers = {database.ids[place]: place for place in _places(database, names)}
    return [numbers[name] for name in names]


def _in_order(
    database: Database, places: list[int], names: list[str], directions: Tensor
) -> Tensor:
    """Return the directions that were given for ``names`` in the order of the rows."""
    numbers = {name: number for number, name in enumerate(names)}
    return directions[[numbers[database.ids[at]] for at in places]]


def _as_classes(database: Database, labels: Tensor, after: Tensor, call: str) -> Tensor:
    """Return what becomes of each class [K]; GcfastError where not the same of all its rows.

    Args:
        database: of class proxies, whose sums do not tell the share of a row.
        labels: [N] int64, before the change.
        after: [N] int64, what becomes of each row.
        call: the method that makes it, of the Explainer too.
    """
    both = torch.stack([labels, after], 1)
    pairs: Tensor = both.unique(dim=0)  # type: ignore[no-untyped-call]
    torn = pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]]
    if len(torn):
        names = [database.label_name(label) for label in sorted(set(torn.tolist()))]
        raise GcfastError(
            "without its images, a class of class proxies changes as a whole, and a part of "
            f"{listed(names)} would stay: give the images to Explainer.{call}(loader)"
        )
    return pairs[:, 1]


def applied(database: Database, change: Change) -> Parts:
    """Return a database in memory with the change made."""
    shards, ids = [], []
    for shard, (start, stop) in _ranges(database):
        rows, names = _changed(database, change, shard, start, stop)
        shards.append(rows)
        ids += names
    manifest = {k: v for k, v in database.manifest.items() if k not in change.dropped}
    return Parts([rows for rows in shards if len(rows.labels)], ids, manifest | change.manifest)


def written(folder: Path, database: Database, change: Change) -> None:
    """Make the change in the database's folder: shards without one stay as they are.

    Raises:
        GcfastError: the folder has changed since it was opened, or another process writes to it.
        OSError: the disk is full, or another failure to write; the database is as it was.
    """
    with (
        writing(folder, lambda: require_same_rows(folder, database.manifest)) as stored,
        disk_errors(folder),
    ):
        number, stop, entries = next_number(folder), 0, []
        further = {}
        if change.classes is not None:
            further["classes"] = write_tensors(folder, CLASSES, change.classes._asdict())
        for entry in stored["shards"]:  # a database that was saved from memory has other pieces
            start, stop = stop, stop + entry["rows"]
            shard = database.rows(start, stop)
            same = torch.equal(shard.labels, change.labels[start:stop])
            if same and bool(change.kept[start:stop].all()):
                entries.append(entry)
                continue
            rows, names = _changed(database, change, shard, start, stop)
            if names:
                entries.append(write_shard(folder, number, rows, names))
                number += 1
        manifest = {key: value for key, value in stored.items() if key not in change.dropped}
        commit(folder, manifest | change.manifest | {"shards": entries} | further)


class Merged:
    """The rows of several databases, one after another.

    Args:
        databases: of one model, layer and settings.
        prefixes: one for each, put before its ids.

    Attributes:
        manifest: theirs together, but for its shards.
        classes: theirs together, for class proxies.
        ids: theirs.

    Raises:
        TypeError, ValueError, ModelMismatchError, GcfastError: as :meth:`gcfast.Database.merge`.
    """

    def __init__(self, databases: Sequence[Database], prefixes: Sequence[str] | None) -> None:
        first = databases[0]
        for number, other in enumerate(databases[1:], 2):
            _check_mergeable(first, other, number)
        if prefixes is not None and len(prefixes) != len(databases):
            raise ValueError(
                f"`prefixes` must be one for each of the {len(databases)} databases, got "
                f"{len(prefixes)}"
            )
        preprocessing, own_prefixes = _preprocessing(databases)
        self.databases = databases
        self.ids = [
            prefix + name
            for prefix, database in zip(prefixes or own_prefixes, databases, strict=True)
            for name in database.ids
        ]
        twice = repeated(self.ids)
        if twice is not None:
            raise ValueError(
                f"`databases` must have different ids, got {twice[0]!r} for more than one row: "
                "give `prefixes` to tell them apart, or remove the row from one"
            )
        self._starts = [0]
        for database in databases:
            self._starts.append(self._starts[-1] + len(database))
        names = column(first.labels.is_floating_point())
        self._labels = [self._relabelled(names, database) for database in databases]
        self.classes: Classes | None = None
        for database in databases:
            if database.classes is not None:
                own = database.classes
                own = own.renamed(self._renumbered(names, database, own.labels))
                self.classes = own if self.classes is None else self.classes.plus(own)
        images = [database.report["images"] for database in databases]
        means = [
            torch.tensor(d.manifest["mean_activation"], dtype=torch.float64) for d in databases
        ]
        pairs = zip(images, means, strict=True)
        self._mean = sum((n * mean for n, mean in pairs), torch.zeros(len(means[0]))) / sum(images)
        kept = {k: v for k, v in first.manifest.items() if k not in (*OF_THE_ROWS, "shards")}
        counts = {name for database in databases for name in database.report}
        self.manifest = kept | {
            "class_names": names.names,
            "report": {
                name: sum(d.report.get(name, 0) for d in databases)
                for name in (*first.report, *sorted(counts - set(first.report)))
            },
            "mean_activation": self._mean.tolist(),
            "preprocessing": preprocessing,
        }
        if self.classes is None:
            self.manifest["older_rows"] = len(self.ids)

    def rows(self, start: int, stop: int) -> Shard:
        """Return consecutive rows, their offsets made with the mean activation of all."""
        pieces, scale = [], self.databases[0].weight_scale
        for number, database in enumerate(self.databases):
            first, end = self._starts[number : number + 2]
            if first < stop and start < end:
                low, high = max(start, first) - first, min(stop, end) - first
                rows = database.rows(low, high)._replace(labels=self._labels[number][low:high])
                factor = scale / database.weight_scale
                pieces.append(
                    in_storage(rows, database.storage, factor, self._mean, first=first + low)
                )
        return Shard(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def _relabelled(self, names: Any, database: Database) -> Tensor:
        """Return the labels of a database's rows as the merged one numbers them."""
        labels = torch.cat([shard.labels for shard in database.shards])
        return self._renumbered(names, database, labels)

    @staticmethod
    def _renumbered(names: Any, database: Database, labels: Tensor) -> Tensor:
        """Return some of a database's labels as the merged one numbers them."""
        own = database.class_names
        if own:
            return torch.as_tensor(names.add(own))[labels]
        names.add(labels[:1].tolist())
        return labels


def _check_mergeable(one: Database, two: Database, number: int) -> None:
    """Refuse to merge databases whose rows do not mean the same."""
    for database in (one, two):
        if "compressed" in database.manifest:
            raise GcfastError(
                "a compressed database cannot be merged: merge the whole ones, and compress them"
            )
        database.require_labels("merging databases")
    a, b = one.manifest, two.manifest
    differs = difference(a["fingerprint"], b["fingerprint"])
    if differs or outputs_differ(a["fingerprint"], b["fingerprint"]):
        why = differs or "other outputs for the same images"
        raise ModelMismatchError(
            f"`databases` must be of one model, number {number} is of another than the first "
            f"({why}): build them with the same one"
        )
    changed = [
        f"{name} is {x!r} and {y!r}"
        for name, x, y in [
            ("layer", a["layer"], b["layer"]),
            *((k, v, b["settings"].get(k)) for k, v in a["settings"].items()),
            ("storage", one.storage, two.storage),
            (RELATIVE, one.relative, two.relative),
            ("channels kept", one.m, two.m),
            ("preprocessing", *(without_images(m.get("preprocessing")) for m in (a, b))),
            ("kind of labels", *("names" if m["class_names"] else "numbers" for m in (a, b))),
        ]
        if x != y
    ]
    if changed:
        raise ValueError(
            f"`databases` must have the same settings, in number {number} and the first "
            f"{'; '.join(changed)}: build them alike"
        )


def without_images(preprocessing: Any) -> Any:
    """Return what is known of the preprocessing, but for the folder of the pictures."""
    if not isinstance(preprocessing, dict):
        return preprocessing
    return {key: value for key, value in preprocessing.items() if key != "images"}


def _preprocessing(databases: Sequence[Database]) -> tuple[Any, list[str]]:
    """Return the preprocessing, and what goes before each database's ids.

    Ids of pictures in different folders become paths from the folder that has them all.
    """
    every = [database.manifest.get("preprocessing") for database in databases]
    roots = [p.get("images") if isinstance(p, dict) else None for p in every]
    kept = every[0]
    if len(set(roots)) == 1 or not isinstance(kept, dict) or None in roots:
        return kept, [""] * len(databases)
    absolute = [os.path.abspath(str(root)) for root in roots]
    common = os.path.commonpath(absolute)
    paths = [Path(os.path.relpath(root, common)) for root in absolute]
    prefixes = ["" if path == Path() else f"{path.as_posix()}/" for path in paths]
    return kept | {"images": common}, prefixes


def _ranges(database: Database) -> Iterator[tuple[Shard, tuple[int, int]]]:
    """Yield each shard, and the numbers of its first row and of that after its last."""
    start = 0
    for shard in database.shards:
        stop = start + len(shard.labels)
        yield shard, (start, stop)
        start = stop


def _changed(
    database: Database, change: Change, shard: Shard, start: int, stop: int
) -> tuple[Shard, list[str]]:
    """Return what becomes of a shard's rows and ids."""
    kept = change.kept[start:stop]
    rows = shard._replace(labels=change.labels[start:stop])
    names = database.ids[start:stop]
    if bool(kept.all()):
        return rows, list(names)
    return (
        Shard(*(values[kept] for values in rows)),
        [name for name, keep in zip(names, kept.tolist(), strict=True) if keep],
    )


def _names(ids: Iterable[str], what: str) -> list[str]:
    """Return ids that are given, checked."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"`{what}` must be several ids, got {ids!r}")
    names = list(ids)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`{what}` must hold ids, which are strings, got {name!r}")
    if not names:
        raise ValueError(f"`{what}` must name at least one row, got none")
    twice = repeated(names)
    if twice is not None:
        raise ValueError(f"`{what}` must name each row once, got {twice[0]!r} twice")
    return names


def _places(database: Database, names: list[str]) -> list[int]:
    """Return the numbers of the rows with these ids; of all that have one, where several do."""
    if "compressed" in database.manifest:
        raise GcfastError(
            "the rows of a compressed database stand for others: change the whole one, and "
            "compress it"
        )
    wanted, places, found = set(names), [], set()
    for start in range(0, len(database), IDS_AT_ONCE):
        for number, name in enumerate(database.ids[start : start + IDS_AT_ONCE], start):
            if name in wanted:
                places.append(number)
                found.add(name)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"the database must have rows of these ids, and has none of {listed(missing)}: "
            "`database.ids` lists them"
        )
    return places
