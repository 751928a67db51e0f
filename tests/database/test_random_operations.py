"""Random operations on a stored database, held against a list of what it must hold."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forks import was_killed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kill_builds import Countdown
from networks import common, pictures
from torch import Tensor

import gcfast
from gcfast.database import shards
from gcfast.database.database import Database

LABELS = ("robin", "wren", "tit")
MODEL = common()
IMAGES, _ = pictures(64)
with torch.inference_mode():
    EMBEDDINGS = torch.nn.functional.normalize(MODEL(IMAGES), dim=1)


class Row(NamedTuple):
    """What the model of the store knows of a row."""

    id: str
    label: str
    image: int


# Without a row of another label, those that are appended have no triplet, and are refused.
TWO_LABELS = precondition(lambda self: len({r.label for r in self.rows}) > 1)


class Store(RuleBasedStateMachine):
    """A database folder beside the list of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "db"
        self.rows: list[Row] = []
        self.named = 0
        self.before = shards.SHARD_ROWS
        shards.SHARD_ROWS = 4

    def teardown(self) -> None:
        shards.SHARD_ROWS = self.before
        shutil.rmtree(self.root)

    def _new(self, count: int, start: int) -> tuple[list[Row], list[object]]:
        """Rows for so many images, two of a label one after another, and a loader of them."""
        rows = [
            Row(f"r{self.named + i}", LABELS[i // 2 % 3], (start + i) % len(IMAGES))
            for i in range(count)
        ]
        self.named += count
        labels, ids = [r.label for r in rows], [r.id for r in rows]
        return rows, [(IMAGES[[r.image for r in rows]], labels, ids)]

    def _explainer(self) -> gcfast.Explainer:
        return gcfast.load(self.folder, MODEL)

    def _settled(self, change: Callable[[], object], rows: list[Row]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an index that is dropped
            change()
        self.rows = rows

    @initialize(count=st.sampled_from((4, 6, 10)), start=st.integers(0, 63))
    def build(self, count: int, start: int) -> None:
        rows, given = self._new(count, start)
        explainer = gcfast.Explainer(MODEL, "backbone", channels=5, triplets=3)
        self._settled(lambda: explainer.build(given, out=self.folder), rows)

    @TWO_LABELS
    @rule(pairs=st.integers(1, 3), start=st.integers(0, 63))
    def append(self, pairs: int, start: int) -> None:
        rows, given = self._new(2 * pairs, start)
        self._settled(lambda: self._explainer().append(given), self.rows + rows)

    @precondition(lambda self: len(self.rows) > 4)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ids = data.draw(self._some(len(self.rows) - 2))
        left = [r for r in self.rows if r.id not in ids]
        self._settled(lambda: Database.open(self.folder).remove(sorted(ids)), left)

    @rule(data=st.data(), label=st.sampled_from(LABELS))
    def relabel(self, data: st.DataObject, label: str) -> None:
        ids = data.draw(self._some(3))
        rows = [r._replace(label=label) if r.id in ids else r for r in self.rows]
        labels = dict.fromkeys(sorted(ids), label)
        self._settled(lambda: Database.open(self.folder).relabel(labels), rows)

    @rule(start=st.integers(0, 63))
    def merge(self, start: int) -> None:
        rows, given = self._new(4, start)
        other = gcfast.Explainer(MODEL, "backbone", channels=5, triplets=3).build(given)
        stored = Database.open(self.folder)
        self._settled(
            lambda: Database.merge(stored, other, out=self.folder, overwrite=True),
            self.rows + rows,
        )

    @rule()
    def index(self) -> None:
        Database.open(self.folder).build_index("Flat")
        explainer = gcfast.load(self.folder, MODEL, index="stored")
        found = explainer.explain_batch(IMAGES[:8], details=True).neighbors
        assert found[:, 0].tolist() == self._nearest(EMBEDDINGS[:8])

    @rule(storage=st.sampled_from(("save", "move")))
    def elsewhere(self, storage: str) -> None:
        other = self.root / "other"
        if storage == "save":
            Database.open(self.folder).save(other)
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(other)
        other.rename(self.folder)

    @TWO_LABELS
    @precondition(lambda _: not torch.cuda.is_available())  # a fork that needs autograd
    @rule(point=st.integers(1, 16), start=st.integers(0, 63))
    def killed_append(self, point: int, start: int) -> None:
        rows, given = self._new(4, start)

        def run() -> None:
            countdown = Countdown(point)
            for name in ("fsync", "rename", "unlink"):
                setattr(os, name, countdown.around(getattr(os, name)))
            warnings.simplefilter("ignore")
            self._explainer().append(given)

        was_killed(run)
        if len(Database.open(self.folder)) > len(self.rows):
            self.rows = self.rows + rows

    @TWO_LABELS
    @rule()
    def another_writer(self) -> None:
        """One that opened it before the other changed it."""
        one, two = self._explainer(), self._explainer()
        rows, given = self._new(2, 5)
        self._settled(lambda: one.append(given), self.rows + rows)
        with pytest.raises(gcfast.GcfastError, match="has changed since it was opened"):
            two.append(self._new(2, 9)[1])

    def _some(self, most: int) -> st.SearchStrategy[set[str]]:
        ids = [r.id for r in self.rows]
        return st.sets(st.sampled_from(ids), min_size=1, max_size=min(most, len(ids)))

    def _nearest(self, queries: Tensor) -> list[int]:
        table = EMBEDDINGS[[r.image for r in self.rows]]
        # The first of twins, which the same image twice is.
        return [int((table - q).square().sum(1).argmin()) for q in queries]

    @invariant()
    def holds_its_rows(self) -> None:
        if not self.rows:
            return
        database = Database.open(self.folder, verify=True)
        assert list(database.ids) == [r.id for r in self.rows]
        names = database.class_names
        assert [names[n] for n in database.labels.tolist()] == [r.label for r in self.rows]
        wanted = EMBEDDINGS[[r.image for r in self.rows]]
        torch.testing.assert_close(database.embeddings, wanted, rtol=1e-5, atol=1e-6)
        assert database.report["rows"] == len(self.rows)
        why = gcfast.load(self.folder, MODEL).explain_batch(IMAGES[:8], details=True)
        assert why.neighbors[:, 0].tolist() == self._nearest(EMBEDDINGS[:8])
        assert bool(((why.maps >= 0) & (why.maps <= 1)).all())


@pytest.mark.parametrize(
    ("examples", "steps"), [(4, 8), pytest.param(50, 40, marks=pytest.mark.slow)]
)
def test_random_operations(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
