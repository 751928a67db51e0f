"""A build that writes as it goes, and that continues after it was killed.

An unfinished build is in the folder that the database will have, next to the old database if one is
to be replaced: the spool of stage 1, a file for each column; the shards of stage 2, as the database
will have them; and ``build.json``, which says how much of each is complete. A part is first flushed
to the disk and then counted there, by a rename, so that at any moment the folder holds a complete
build of so many images or rows, and perhaps bytes after it that do not count. At the end
``build.json`` becomes the manifest (:mod:`gcfast.database.write`).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from gcfast.builder.describe import changed_draws, changed_settings, describe, report_of, zero_rows
from gcfast.builder.embed import Embedded, Totals, embed
from gcfast.builder.rows import Made, Rows
from gcfast.builder.spool import KeptSpool
from gcfast.database import files, shards
from gcfast.database.database import Database
from gcfast.database.float16 import in_storage, scale_for
from gcfast.database.manifest import FORMAT, STATE
from gcfast.database.shards import Shard, ShardFile
from gcfast.database.write import (
    CLASSES,
    HEAD,
    check_target,
    commit,
    disk_errors,
    next_number,
    state_of,
    write_shard,
    write_tensors,
    writing,
)
from gcfast.errors import DamagedDatabaseError, GcfastError, ModelMismatchError
from gcfast.method.head import AffineHead
from gcfast.method.labels import column
from gcfast.method.settings import Settings
from gcfast.model.fingerprint import difference
from gcfast.model.network import Network

STATE_FORMAT = "gcfast-build"
# How much of stage 1 a killed build loses at most: images, or seconds where they are slow.
COMMIT_ROWS = 8_192
COMMIT_SECONDS = 30.0


def build_into(
    target: Path,
    network: Network,
    loader: Iterable[Any],
    settings: Settings,
    same: dict[str, Any],
    *,
    progress: bool,
    resume: bool,
    overwrite: bool,
) -> Database:
    """Build a database at ``target``; see :meth:`gcfast.Explainer.build`.

    Args:
        target: the database's folder.
        network: the model and its layer.
        loader: the images.
        settings: of the rows.
        same: of :func:`gcfast.builder.describe.identity`; an unfinished build of others is not
            resumed.
        progress: show bars on stderr.
        resume: continue an unfinished build.
        overwrite: replace a database that is there.
    """
    work = UnfinishedBuild(target, network, loader, settings, progress)
    return work.run(same, resume=resume, overwrite=overwrite)


class UnfinishedBuild:
    """A build in its folder, which is locked while it runs."""

    def __init__(
        self,
        folder: Path,
        network: Network,
        loader: Iterable[Any],
        settings: Settings,
        progress: bool,
    ) -> None:
        self.folder = folder
        self.network = network
        self.loader = loader
        self.settings = settings
        self.progress = progress
        self.state: dict[str, Any] = {}
        self.finished: dict[str, Any] | None = None  # the manifest, if only its commit is missing

    def run(self, same: dict[str, Any], *, resume: bool, overwrite: bool) -> Database:
        """Do all that is not done yet; arguments and errors as :func:`build_into`."""

        def check() -> None:
            check_target(self.folder, overwrite=overwrite, resume=resume, name="out")

        with writing(self.folder, check):
            self.begin(same)
            with self.kept():
                manifest = self.finished or self.make()
                with disk_errors(self.folder):
                    commit(self.folder, manifest, build=True)
        return Database.open(self.folder, verify=False)

    def begin(self, same: dict[str, Any]) -> None:
        """Continue the unfinished build that is there, if it is of the same; or a new one."""
        # As JSON has it, so that it compares with what is read back.
        same = json.loads(json.dumps(same))
        try:
            stored = state_of(self.folder)
        except ValueError:
            raise DamagedDatabaseError(
                f"{self.folder / STATE} is damaged: it is not JSON"
            ) from None
        if stored is None:
            self.state = {
                "format": STATE_FORMAT,
                "format_version": 1,
                **same,
                "stage": "embedding",
                "channels_last": None,
                "image_shape": None,
                "head": False,
                "spool": None,
                "totals": None,
                "weight_scale": None,
                "shards": [],
            }
        elif stored.get("format") == FORMAT:
            self._refuse_others(stored, same, "storage", "preprocessing")
            self.state = self.finished = stored
        else:
            if stored.get("format") != STATE_FORMAT or stored.get("format_version") != 1:
                raise GcfastError(
                    f"{self.folder / STATE} is of another gcfast: finish it there, or remove it"
                )
            self._refuse_others(stored, same, "preprocessing")
            self.state = stored
            if stored["storage"] != same["storage"]:
                if stored["shards"]:
                    warnings.warn(
                        f"the rows of the unfinished build {self.folder} are in "
                        f"{stored['storage']} and are made again in {same['storage']}",
                        stacklevel=2,
                    )
                # The results of stage 1 are float32 whatever the rows are stored in.
                stored |= {"storage": same["storage"], "weight_scale": None, "shards": []}

    def _refuse_others(self, stored: dict[str, Any], now: dict[str, Any], *keys: str) -> None:
        """Raise where the unfinished build is of another model, layer or settings, or these."""
        other = difference(stored["fingerprint"], now["fingerprint"])
        if other:
            raise ModelMismatchError(
                f"the unfinished build {self.folder} is of another model than this one: {other}"
            )
        changed = changed_settings(stored["settings"], now["settings"])
        draws = changed_draws(stored, self.settings)
        changed += [draws] if draws else []
        for key in keys:
            if stored[key] != now[key]:
                changed.append(f"{key} was {stored[key]!r}, is {now[key]!r}")
        if None not in (stored["layer"], now["layer"]) and stored["layer"] != now["layer"]:
            changed.append(f"layer was {stored['layer']!r}, is {now['layer']!r}")
        if changed:
            raise ValueError(
                f"`resume` must have the settings that {self.folder} was begun with: "
                + "; ".join(changed)
            )

    @property
    def begun(self) -> bool:
        """Whether anything is complete that a later build can continue from."""
        return self.state["totals"] is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say in an error how to continue; a build with nothing complete leaves nothing."""
        try:
            yield
        except BaseException as error:
            if self.finished is None and not self.begun:
                (self.folder / STATE).unlink(missing_ok=True)
            else:
                error.add_note(
                    f"what was done is kept in {self.folder}: resume=True (--resume) continues; "
                    f"to start over, delete {self.folder / STATE}"
                )
            raise

    def make(self) -> dict[str, Any]:
        """Do what is not done yet; returns the database's manifest."""
        self._store()
        return self._make_rows(self.embed())

    def _store(self) -> None:
        with disk_errors(self.folder):
            files.replace(self.folder / STATE, json.dumps(self.state, indent=1).encode())

    # Stage 1

    def opened(self) -> tuple[KeptSpool, Totals]:
        """Return what stage 1 has committed so far; the network then knows its layer."""
        state, network = self.state, self.network
        with disk_errors(self.folder):
            spool = KeptSpool(self.folder, state["spool"])
        if state["totals"] is None:
            return spool, Totals(labels=column(self.settings.objective.real_labels))
        if network.layer_name is None:
            network.set_layer(state["layer"])
        network.channels_last = state["channels_last"]
        network.image_shape = state.get("image_shape")
        return spool, self._totals(spool)

    def embed(self) -> Embedded:
        """Stage 1, from the last commit on."""
        state, network = self.state, self.network
        spool, totals = self.opened()
        if state["stage"] != "embedding":
            return totals.embedded(spool)
        last_rows, last_time = totals.rows, time.monotonic()

        def after_batch() -> None:
            nonlocal last_rows, last_time
            late = time.monotonic() - last_time > COMMIT_SECONDS
            if totals.rows - last_rows >= COMMIT_ROWS or late:
                self.commit(spool, totals)
                last_rows, last_time = totals.rows, time.monotonic()

        embedded = embed(
            network,
            self.loader,
            self.settings,
            progress=self.progress,
            spool=spool,
            totals=totals,
            after_batch=after_batch,
        )
        state["stage"] = "rows"
        self.commit(spool, totals)
        return embedded

    def commit(self, spool: KeptSpool, totals: Totals) -> None:
        """Flush the spool to the disk, and count what it holds as done."""
        state = self.state
        with disk_errors(self.folder):
            if totals.head is not None and not state["head"]:
                head = {"weight": totals.head.weight.cpu(), "bias": totals.head.bias.cpu()}
                content = safetensors.torch.save(head, {"unit": str(int(totals.head.unit))})
                files.replace(self.folder / HEAD, content)
            columns = spool.commit()
        state |= {
            "layer": self.network.layer_name,
            "channels_last": self.network.channels_last,
            "image_shape": self.network.image_shape,
            "head": totals.head is not None,
            "spool": columns,
            "totals": {
                "rows": totals.rows,
                "channel_sum": totals.channel_sum.tolist(),  # JSON gives every bit back
                "pixel_count": totals.pixel_count,
                "id_bytes": totals.id_bytes,
                "class_names": totals.labels.names,
            },
        }
        self._store()

    def _totals(self, spool: KeptSpool) -> Totals:
        stored, head = self.state["totals"], None
        if self.state["head"]:
            device = self.network.device(torch.device("cpu"))
            try:
                with safetensors.safe_open(self.folder / HEAD, framework="pt") as file:
                    head = AffineHead(
                        file.get_tensor("weight").to(device),
                        file.get_tensor("bias").to(device),
                        file.metadata()["unit"] == "1",
                    )
            except (safetensors.SafetensorError, OSError, KeyError) as error:
                raise DamagedDatabaseError(f"cannot read {self.folder / HEAD}: {error}") from error
        seen = set(spool.column("labels").tolist())
        return Totals(
            rows=stored["rows"],
            head=head,
            channel_sum=torch.tensor(stored["channel_sum"], dtype=torch.float64),
            pixel_count=stored["pixel_count"],
            id_bytes=stored["id_bytes"],
            labels=column(self.settings.objective.real_labels, stored["class_names"], seen),
        )

    # Stage 2

    def made(self, embedded: Embedded, start: int) -> Iterator[Made]:
        """Make the rows of the images from ``start`` on, as many at once as a shard has."""
        rows = Rows(self.network, embedded, self.settings, start=start)
        return rows.made(self.loader, capacity=shards.SHARD_ROWS, progress=self.progress)

    def _make_rows(self, embedded: Embedded) -> dict[str, Any]:
        """Stage 2, from the last complete shard on; returns the manifest."""
        state = self.state
        made = state["shards"]
        C, names = len(embedded.mean_activation), len(embedded.class_names)
        for shard in made:
            file = ShardFile(self.folder, shard["entry"], C, names)  # raises where it is damaged
            if "zero" not in shard:  # begun before these were counted
                shard["zero"] = zero_rows(file.tensors.weights)
        start = made[-1]["next"] if made else 0
        parts = self.made(embedded, start)
        for number, part in enumerate(parts, next_number(self.folder)):
            stored = self._in_storage(part.rows, embedded)
            with disk_errors(self.folder):
                entry = write_shard(self.folder, number, stored, part.ids)
            made.append(
                {
                    "entry": entry,
                    "next": int(part.images[-1]) + 1,
                    "hardest": int((stored.triplet_counts == 0).sum()),
                    "estimated": part.estimated,
                    "zero": zero_rows(stored.weights),
                }
            )
            self._store()
        written, zero = {}, sum(shard["zero"] for shard in made)
        classes = embedded.classes()
        if classes is not None:
            zero = len(embedded.ids) - int(classes.counts.sum())
            with disk_errors(self.folder):
                written = {"classes": write_tensors(self.folder, CLASSES, classes._asdict())}
        report = report_of(
            embedded.labels,
            sum(shard["entry"]["rows"] for shard in made),
            sum(shard["hardest"] for shard in made),
            sum(shard.get("estimated", 0) for shard in made),
            zero,
            self.settings,
        )
        manifest = describe(self.network, embedded, state, report) | written
        if state["weight_scale"] != 1:
            manifest["weight_scale"] = state["weight_scale"]
        return manifest | {"shards": [shard["entry"] for shard in made]}

    def _in_storage(self, rows: Shard, embedded: Embedded) -> Shard:
        state = self.state
        if state["weight_scale"] is None:
            state["weight_scale"] = scale_for(rows.weights, state["storage"])
        first = sum(shard["entry"]["rows"] for shard in state["shards"])
        try:
            return in_storage(
                rows,
                state["storage"],
                state["weight_scale"],
                embedded.mean_activation,
                first=first,
            )
        except ValueError as error:
            error.add_note(
                "with storage='float32' (--storage float32) a resumed build writes the rows again, "
                "from the embeddings that it has"
            )
            raise
