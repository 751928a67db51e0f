"""A build that writes as it goes, and goes on where a killed one stopped.

The work is done in a folder beside the database's, ``NAME.partial``: the spool of stage 1, a file a
column; the shards of stage 2, as the database will have them; and ``build.json``, which says how
much of each is whole. A part is flushed to the disk first and then counted there, by a rename, so
that at any moment the folder holds a whole build of so many images or rows, and perhaps bytes
behind it that do not count. At the end the manifest is written and the folder gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from gcfast.builder.describe import changed_settings, describe, report_of
from gcfast.builder.embed import Embedded, EmbeddingStage, Totals
from gcfast.builder.rows import Rows, RowTable, fill_from_second_pass, fill_from_spool
from gcfast.builder.spool import KeptSpool
from gcfast.database import files, shards
from gcfast.database.database import Database
from gcfast.database.float16 import in_storage, scale_for
from gcfast.database.manifest import (
    MANIFEST,
    STATE,
    check_target,
    encoded,
    named_files,
    partial_folder,
    read_manifest,
)
from gcfast.database.partial import HEAD, check_unfinished, state_of, tidy
from gcfast.database.shards import ShardFile, write_shard
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
        resume: go on where an unfinished build stopped.
        overwrite: replace a database that is there.
    """
    tidy(target)
    check_target(target, overwrite, name="out")
    check_unfinished(target, resume)
    with _Unfinished.opened(target, same) as work:
        if not work.finished:
            embedded = work.embed(network, loader, settings, progress=progress)
            work.make_rows(network, loader, embedded, settings, progress=progress)
        # Once more: hours may have gone by.
        check_target(target, overwrite, name="out")
        work.finish()
    return Database.open(target, verify=False)


class _Unfinished:
    """The folder of a build under way, held by this process alone."""

    def __init__(self, target: Path, same: dict[str, Any]) -> None:
        self.target = target
        self.folder = partial_folder(target)
        self.state: dict[str, Any] = {
            "format": STATE_FORMAT,
            "format_version": 1,
            # As JSON has it, so that it compares with what is read back.
            **json.loads(json.dumps(same)),
            "stage": "embedding",
            "channels_last": None,
            "head": False,
            "spool": None,
            "totals": None,
            "weight_scale": None,
            "shards": [],
        }
        self.finished = False

    @classmethod
    @contextmanager
    def opened(cls, target: Path, same: dict[str, Any]) -> Iterator[_Unfinished]:
        """A new or an unfinished build; one that fails with nothing whole leaves nothing."""
        one = cls(target, same)
        with one._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            one.folder.mkdir(exist_ok=True)
        with files.locked(one.folder, "building in"):
            one._read()
            try:
                yield one
            except BaseException as error:
                if one.state["totals"] is None:
                    shutil.rmtree(one.folder, ignore_errors=True)
                elif one.folder.exists():
                    error.add_note(
                        f"what was done is kept in {one.folder}: resume=True (--resume) continues; "
                        "who wants to begin anew removes it"
                    )
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the database {self.target}: {error.strerror or error}",
            ) from error

    def _read(self) -> None:
        """Take over what a former process left, if it was building the same."""
        stored = state_of(self.folder)
        if (self.folder / MANIFEST).exists():
            # Only cleaning up and the new name were missing.
            stored = read_manifest(self.folder) if stored is None else stored
            self._refuse_others(stored, "storage", "preprocessing")
            self.finished = True
            self.state["totals"] = {}
        elif stored is None:
            if (self.folder / STATE).exists():
                raise DamagedDatabaseError(f"{self.folder / STATE} is damaged: it is not JSON")
            try:
                with self._writing():
                    self._commit()
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        else:
            if stored.get("format") != STATE_FORMAT or stored.get("format_version") != 1:
                raise GcfastError(
                    f"{self.folder / STATE} is of another gcfast: finish it there, or remove it"
                )
            self._refuse_others(stored, "preprocessing")
            storage, self.state = self.state["storage"], stored
            if stored["storage"] != storage:
                if stored["shards"]:
                    warnings.warn(
                        f"the rows of the unfinished build {self.folder} are in "
                        f"{stored['storage']} and are made anew in {storage}",
                        stacklevel=2,
                    )
                # What stage 1 made is float32 whatever the rows are stored in: those alone are
                # made anew, and the files of the shards written over.
                self.state |= {"storage": storage, "weight_scale": None, "shards": []}
                with self._writing():
                    self._commit()

    def _refuse_others(self, stored: dict[str, Any], *keys: str) -> None:
        """Raise where the unfinished build is of another model, layer or settings, or these."""
        now = self.state
        other = difference(stored.get("fingerprint", {}), now["fingerprint"])
        if other:
            raise ModelMismatchError(
                f"the unfinished build {self.folder} is of another model than this one: {other}"
            )
        changed = changed_settings(stored["settings"], now["settings"])
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

    def _commit(self) -> None:
        files.replace(self.folder / STATE, json.dumps(self.state, indent=1).encode())

    # Stage 1

    def embed(
        self, network: Network, loader: Iterable[Any], settings: Settings, *, progress: bool
    ) -> Embedded:
        """Stage 1, from the last commit on."""
        state = self.state
        with self._writing():
            spool = KeptSpool(self.folder, state["spool"])
        real_labels = settings.objective.real_labels
        totals = Totals(labels=column(real_labels))
        if state["totals"] is not None:
            totals = self._totals(network, spool, real_labels)
            if network.layer_name is None:
                network.set_layer(state["layer"])
            network.channels_last = state["channels_last"]
        if state["stage"] == "embedding":
            last_rows, last_time = totals.rows, time.monotonic()

            def after_batch() -> None:
                nonlocal last_rows, last_time
                late = time.monotonic() - last_time > COMMIT_SECONDS
                if totals.rows - last_rows >= COMMIT_ROWS or late:
                    self._commit_totals(network, spool, totals)
                    last_rows, last_time = totals.rows, time.monotonic()

            stage = EmbeddingStage(
                network,
                l2_normalize=settings.l2_normalize,
                keep_pooled=settings.method == "gradcam++",
                channels=settings.channels,
            )
            stage.run(
                loader,
                spool,
                totals,
                progress=progress,
                one_pass=isinstance(loader, Iterator),
                after_batch=after_batch,
            )
            totals.labels.require_two()
            state["stage"] = "rows"
            self._commit_totals(network, spool, totals)
        return totals.embedded(spool)

    def _commit_totals(self, network: Network, spool: KeptSpool, totals: Totals) -> None:
        state = self.state
        with self._writing():
            if totals.head is not None and not state["head"]:
                head = {"weight": totals.head.weight.cpu(), "bias": totals.head.bias.cpu()}
                content = safetensors.torch.save(head, {"unit": str(int(totals.head.unit))})
                files.replace(self.folder / HEAD, content)
            columns = spool.commit()
            state |= {
                "layer": network.layer_name,
                "channels_last": network.channels_last,
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
            self._commit()

    def _totals(self, network: Network, spool: KeptSpool, real_labels: bool) -> Totals:
        stored = self.state["totals"]
        head = None
        if self.state["head"]:
            device = network.device(torch.device("cpu"))
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
            labels=column(real_labels, stored["class_names"], seen),
        )

    # Stage 2

    def make_rows(
        self,
        network: Network,
        loader: Iterable[Any],
        embedded: Embedded,
        settings: Settings,
        *,
        progress: bool,
    ) -> None:
        """Stage 2, from the last whole shard on, and the manifest."""
        state = self.state
        made = state["shards"]
        for shard in made:
            ShardFile(self.folder, shard["entry"])  # raises where it is not whole

        def flush(table: RowTable) -> None:
            rows, kept = table.shard(embedded)
            if state["weight_scale"] is None:
                state["weight_scale"] = scale_for(rows.weights, state["storage"])
            if state["storage"] != "float32":
                try:
                    rows = in_storage(
                        rows,
                        state["storage"],
                        state["weight_scale"],
                        embedded.mean_activation,
                        first=sum(shard["entry"]["rows"] for shard in made),
                    )
                except ValueError as error:
                    error.add_note(
                        "with storage='float32' (--storage float32) a resumed build writes the "
                        "rows anew, from the embeddings that it has"
                    )
                    raise
            numbers = kept.tolist()
            whole = numbers[-1] - numbers[0] == len(numbers) - 1
            ids = (
                embedded.ids[numbers[0] : numbers[-1] + 1]
                if whole
                else [embedded.ids[number] for number in numbers]
            )
            with self._writing():
                entry = write_shard(self.folder, len(made), rows, ids)
                made.append(
                    {
                        "entry": entry,
                        "next": numbers[-1] + 1,
                        "hardest": int((rows.triplet_counts == 0).sum()),
                    }
                )
                self._commit()

        rows = Rows(
            embedded,
            settings,
            network.device(torch.device("cpu")),
            start=made[-1]["next"] if made else 0,
            capacity=shards.SHARD_ROWS,
            flush=flush,
        )
        if embedded.head is not None:
            fill_from_spool(rows, progress=progress)
        else:
            fill_from_second_pass(network, loader, rows, progress=progress)
        report = report_of(
            embedded.labels,
            sum(shard["entry"]["rows"] for shard in made),
            sum(shard["hardest"] for shard in made),
            settings,
        )
        manifest = describe(network, embedded, state, report)
        if state["weight_scale"] != 1:
            manifest["weight_scale"] = state["weight_scale"]
        manifest["shards"] = [shard["entry"] for shard in made]
        with self._writing():
            files.replace(self.folder / MANIFEST, encoded(manifest))

    def finish(self) -> None:
        """Leave only the database, and give it its name."""
        with self._writing():
            named = {STATE, *named_files(read_manifest(self.folder))}
            for file in sorted(self.folder.iterdir()):
                if file.name not in named:
                    file.unlink()
            if self.target.exists():
                files.move_into_place(self.folder, self.target)
                # By this file `tidy` knows what was replaced, so that has to be gone for good.
                files.sync_folder(self.target.parent)
                if not os.path.lexists(self.folder):
                    (self.target / STATE).unlink(missing_ok=True)
            else:
                (self.folder / STATE).unlink(missing_ok=True)
                files.move_into_place(self.folder, self.target)
