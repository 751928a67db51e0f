"""Databases of embeddings that nobody has labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import common, pictures

import gcfast
from gcfast.builder.given import made_labels
from gcfast.model.network import Network

N = 80


def given(labels: Any, model: Any = None, **changes: Any) -> tuple[gcfast.Explainer, Any]:
    torch.manual_seed(1)
    options = {k: changes.pop(k) for k in ("rows", "out", "pooled") if k in changes}
    model = common() if model is None else model
    images, _ = pictures(N)
    captured = Network(model, "backbone").embed(images)
    if options.get("pooled"):
        options["pooled"] = captured.activations.mean((2, 3))
    explainer = gcfast.Explainer(model, "backbone", **({"channels": 5} | changes))
    database = explainer.build_from_embeddings(
        captured.output, labels, sample=images, check=(images[:3], [0, 1, 2]), **options
    )
    return explainer, database


@pytest.mark.parametrize("triplets", [10, "all"])
@pytest.mark.parametrize("labels", ["neighbors", "neighbors:1", "kmeans:4"])
def test_rows_are_made_without_labels_and_on_demand_too(labels: str, triplets: Any) -> None:
    explainer, database = given(labels, triplets=triplets)
    described = "neighbors:5" if labels == "neighbors" else labels
    assert database.made_labels == described
    assert len(database) == N
    assert database.report["skipped_single"] == database.report["skipped_no_triplet"] == 0
    queries, _ = pictures(4)
    maps = explainer.explain_batch(queries, details=True)
    assert float(maps.maps.max()) > 0.1
    lazy, small = given(labels, triplets=triplets, rows="on-demand")
    torch.testing.assert_close(lazy.explain_batch(queries), maps.maps, rtol=0, atol=3e-6)
    assert 0 < small.made <= 4
    name = database.label_name(int(maps.labels[0, 0]))
    assert name.startswith("cluster ") if labels == "kmeans:4" else name.isdecimal()


def test_clusters_are_those_of_kmeans_and_a_label_each_explains_the_same() -> None:
    _, database = given("kmeans:4")
    _, again = given(database.labels)
    assert len(set(database.labels.tolist())) == 4
    assert torch.equal(again.channels, database.channels)
    assert torch.equal(again.weights, database.weights)


def test_a_large_table_is_searched_through_inverted_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, exact = given("neighbors", triplets="all")
    monkeypatch.setattr(made_labels, "EXACT_ROWS", 10)
    monkeypatch.setattr(made_labels, "_lists", lambda _rows: 2)
    _, database = given("neighbors", triplets="all")
    assert torch.equal(database.channels, exact.channels)  # all lists are searched


def test_what_needs_labels_is_refused(tmp_path: Path) -> None:
    explainer, database = given("neighbors", out=tmp_path / "db")
    images, labels = pictures(4)
    words = r"needs labels, and those of this database are made of its embeddings \(neighbors:5\)"
    with pytest.raises(gcfast.GcfastError, match=f"explain_labelled {words}"):
        explainer.explain_labelled(images, labels)
    for call in (explainer.calibrate, explainer.append, explainer.rebuild):
        with pytest.raises(gcfast.GcfastError, match=words):
            call([(images, labels)])
    with pytest.raises(gcfast.GcfastError, match=f"merging databases {words}"):
        gcfast.Database.merge(database, database, prefixes=["a", "b"])


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "name": ("clusters", {}, "or 'neighbors', 'neighbors:3' or 'kmeans:1000'"),
    "no number": ("kmeans", {}, "or 'kmeans:1000' where there are none, got 'kmeans'"),
    "one center": ("kmeans:1", {}, "`labels` must be from 2 to 80"),
    "too many": ("neighbors:79", {}, "`labels` must be from 1 to 78"),
    "proxy": (
        "neighbors", {"method": "proxy", "channels": 50, "pooled": True}, "which needs classes"
    ),
    "pairs": ("neighbors", {"objective": gcfast.PairDistance("positive")}, "which needs classes"),
    "all": (
        "neighbors", {"method": "gradcam++", "triplets": "all", "pooled": True}, "must be a number"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ways_are_refused(name: str) -> None:
    labels, changes, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        given(labels, **changes)


@pytest.mark.parametrize("labels", ["neighbors", "kmeans:4"])
def test_other_methods_go_without_labels_too(labels: str) -> None:
    settings = {"method": "gradcam++", "pooled": True}
    assert len(given(labels, **settings)[1]) == N
    if labels == "kmeans:4":
        proxies = given(labels, method="proxy", channels=50, pooled=True)[1]
        assert len(proxies.classes.labels) == 4
