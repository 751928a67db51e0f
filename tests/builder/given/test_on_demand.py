"""Rows that are made when they are asked for, against a build of all of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import common, pictures

import gcfast
from gcfast.builder.given.on_demand import OnDemandDatabase
from gcfast.model.network import Network

N = 90
CLOSE = 3e-6


def both(
    triplets: Any = "all", objective: gcfast.Objective | None = None, **settings: Any
) -> tuple[gcfast.Explainer, gcfast.Explainer, OnDemandDatabase]:
    """(An explainer of all rows, one of rows on demand, its database); one class has one image."""
    model, (images, labels) = common(), pictures(N, classes=4)
    labels[7] = 99
    captured = Network(model, "backbone").embed(images)
    explainers = []
    for rows in ("all", "on-demand"):
        explainer = gcfast.Explainer(
            model, "backbone", channels=5, triplets=triplets, objective=objective, **settings
        )
        database = explainer.build_from_embeddings(
            captured.output,
            labels,
            sample=images,
            check=(images[:3], [0, 1, 2]),
            pooled=captured.activations.mean((2, 3)),
            rows=rows,
        )
        explainers.append(explainer)
    assert isinstance(database, OnDemandDatabase)
    return explainers[0], explainers[1], database


@pytest.mark.parametrize("triplets", ["all", 20])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize(
    "objective", [gcfast.TripletLoss(0.05), gcfast.DistanceDifference()], ids=["triplet", "all"]
)
def test_rows_equal_those_of_a_build(triplets: Any, method: str, objective: Any) -> None:
    whole, lazy, database = both(triplets, objective, method=method)
    queries, _ = pictures(12)
    assert database.made == 0
    wanted = whole.explain_batch(queries, details=True)
    got = lazy.explain_batch(queries, details=True)
    assert torch.equal(got.neighbors, wanted.neighbors)
    assert float((got.maps - wanted.maps).abs().max()) <= CLOSE
    assert 0 < database.made == len(set(got.neighbors.flatten().tolist())) <= 12

    rows, scale = whole.database, whole.database.weights.abs().max(1, keepdim=True).values
    assert len(database) == len(rows) == N - 1  # the one of a class of its own has no row
    assert database.ids == rows.ids
    assert torch.equal(database.channels, rows.channels)  # makes what is missing
    assert float(((database.weights - rows.weights) / scale).abs().max()) <= CLOSE
    assert database.made == N - 1
    assert database.report == rows.report
    assert torch.equal(database.triplet_counts, rows.triplet_counts)


def test_embeddings_labels_and_an_empty_batch_make_no_row() -> None:
    whole, lazy, database = both()
    assert torch.equal(database.embeddings, whole.database.embeddings)
    assert torch.equal(database.labels, whole.database.labels)
    assert lazy.explain_batch(torch.empty(0, 3, 8, 8)).shape == (0, 8, 8)
    assert repr(database)
    assert database.made == 0


def test_a_row_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lazy, database = both()
    queries, _ = pictures(12)
    first = lazy.explain_batch(queries)
    monkeypatch.setattr(database, "_make", None)
    assert torch.equal(lazy.explain_batch(queries), first)


@pytest.mark.parametrize(
    "change", [{"k": 3}, {"index": "Flat"}, {"index": "Flat", "k": 2}], ids=str
)
def test_other_searches_make_their_rows(change: dict[str, Any]) -> None:
    whole, _, database = both()
    model = whole.network.model
    queries, _ = pictures(12)
    settings = {"channels": 5, "triplets": "all"} | change
    wanted, got = (
        gcfast.Explainer(model, "backbone", one, **settings).explain_batch(queries)
        for one in (whole.database, database)
    )
    assert float((wanted - got).abs().max()) <= CLOSE
    assert 0 < database.made < len(database)


def test_a_second_look_and_streams_make_their_rows() -> None:
    whole, _, database = both(20)
    model = whole.network.model
    queries, _ = pictures(12)
    one, two = (
        gcfast.Explainer(model, "backbone", d, channels=5, triplets=20, requery=True)
        for d in (whole.database, database)
    )
    torch.testing.assert_close(two.explain_batch(queries), one.explain_batch(queries))
    wanted, got = (list(e.explain_stream([queries[:5], queries[5:]])) for e in (one, two))
    torch.testing.assert_close(got, wanted)


def test_saving_makes_all_rows(tmp_path: Path) -> None:
    whole, _, database = both(20)
    with pytest.raises(TypeError, match="save it"):
        pickle.dumps(database)
    database.save(tmp_path / "db")
    opened = gcfast.Database.open(tmp_path / "db")
    assert torch.equal(opened.channels, whole.database.channels)
    assert opened.report == whole.database.report
    assert opened.manifest["from_embeddings"] == whole.database.manifest["from_embeddings"]
    again = pickle.loads(pickle.dumps(database))
    assert type(again) is gcfast.Database
    assert len(again) == len(database)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "proxy": ({"method": "proxy", "channels": 50, "triplets": 50}, {}, "method='proxy'"),
    "skip": ({"on_no_triplet": "skip"}, {}, "on_no_triplet='skip'"),
    "function": ({"objective": lambda a, p, n: (a * (p - n)).sum(1)}, {}, "may have no row"),
    "folder": ({}, {"out": "somewhere"}, "`rows` must be 'all' with `out`"),
    "choice": ({}, {"rows": "some"}, "`rows` must be one of 'all', 'on-demand'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_on_demand_is_refused(name: str) -> None:
    settings, options, words = REFUSED[name]
    model, (images, labels) = common(), pictures(N)
    captured = Network(model, "backbone").embed(images)
    explainer = gcfast.Explainer(model, "backbone", **({"channels": 5} | settings))
    with pytest.raises(ValueError, match=words):
        explainer.build_from_embeddings(
            captured.output,
            labels,
            sample=images,
            check=(images[:3], [0, 1, 2]),
            pooled=captured.activations.mean((2, 3)),
            **({"rows": "on-demand"} | options),
        )


def test_export_is_refused() -> None:
    _, lazy, database = both()
    with pytest.raises(ValueError, match="`rows` of the database must be 'all' to be exported"):
        lazy.export()
    assert database.made == 0
