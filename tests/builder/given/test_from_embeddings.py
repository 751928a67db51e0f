"""A database of embeddings alone against a build from the images, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from networks import CHANNELS, common, loader, other, pictures
from torch import Tensor

import gcfast
from gcfast.database.manifest import read_manifest
from gcfast.model.network import Network

N = 60
SAME = 1e-6


class Case:
    """A model, its images, a build from them, and its raw embeddings and pooled activations."""

    def __init__(self, *, norm: bool = False, **settings: Any) -> None:
        self.model = common(norm=norm)
        self.images, self.labels = pictures(N)
        self.settings = {"channels": 4} | settings
        self.built = self.explainer()
        self.built.build([(self.images, self.labels)])
        captured = Network(self.model, "backbone").embed(self.images)
        self.raw = captured.output.detach()
        self.pooled = captured.activations.detach().mean((2, 3))
        self.unit = torch.nn.functional.normalize(self.raw, dim=1)
        self.head = (self.model.head[1].weight, self.model.head[1].bias)

    def explainer(self, **settings: Any) -> gcfast.Explainer:
        return gcfast.Explainer(self.model, "backbone", **(self.settings | settings))

    def given(
        self, embeddings: Any = None, labels: Any = None, **changes: Any
    ) -> tuple[gcfast.Explainer, gcfast.Database]:
        explainer = self.explainer()
        asked = {"sample": self.images, "check": (self.images[:8], range(8))} | changes
        database = explainer.build_from_embeddings(
            self.unit if embeddings is None else embeddings,
            self.labels if labels is None else labels,
            **asked,
        )
        return explainer, database

    def assert_same_maps(self, explainer: gcfast.Explainer) -> None:
        queries, _ = pictures(9)
        wanted, got = (e.explain_batch(queries) for e in (self.built, explainer))
        assert float(wanted.max()) > 0.9
        assert float((wanted - got).abs().max()) <= SAME


def assert_same_rows(got: gcfast.Database, wanted: gcfast.Database, *, scale: bool) -> None:
    assert torch.equal(got.channels, wanted.channels)
    assert torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.triplet_counts, wanted.triplet_counts)
    a, b = got.weights, wanted.weights
    if not scale:
        a, b = (w / w.norm(dim=1, keepdim=True) for w in (a, b))
    assert float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) <= SAME


@pytest.mark.parametrize("norm", [False, True], ids=["raw output", "unit output"])
@pytest.mark.parametrize("triplets", [5, "all"])
@pytest.mark.parametrize("evidence", ["for", "against"])
def test_unit_vectors_give_the_channels_and_the_maps_of_a_build(
    norm: bool, triplets: Any, evidence: str
) -> None:
    case = Case(norm=norm, triplets=triplets, evidence=evidence)
    explainer, database = case.given()
    assert_same_rows(database, case.built.database, scale=False)
    assert torch.equal(database.embeddings, case.built.database.embeddings)
    case.assert_same_maps(explainer)


@pytest.mark.parametrize("known", ["raw vectors", "norms", "doubled norms", "pooled"])
def test_norms_give_the_weights_too(known: str) -> None:
    case = Case()
    norms = case.raw.norm(dim=1)
    vectors, columns = {
        "raw vectors": (case.raw, {}),
        "norms": (case.unit, {"norms": norms}),
        "doubled norms": (case.unit, {"norms": 2 * norms}),
        "pooled": (case.unit, {"pooled": case.pooled}),
    }[known]
    explainer, database = case.given(vectors, **columns)
    assert not database.relative
    assert_same_rows(database, case.built.database, scale=True)
    torch.testing.assert_close(database.offsets, case.built.database.offsets, rtol=1e-5, atol=1e-7)
    queries, _ = pictures(9)
    wanted, got = (e.explain_batch(queries, normalize=None) for e in (case.built, explainer))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_unit_vectors_that_became_shorter_do_not_tell_their_norms() -> None:
    """As those of a compressed index; two images can agree with them by chance."""
    case = Case()
    norms = case.raw.norm(dim=1)
    shorter = case.unit * (1 - 0.1 * torch.rand(N, 1))
    shorter[1] = case.unit[1] * shorter[0].norm() * norms[1] / norms[0]  # as the raw ones have it
    _, database = case.given(shorter, check=(case.images[:2], [0, 1]))
    assert database.relative


def test_rows_are_the_same_bit_for_bit_where_nothing_is_normalized() -> None:
    case = Case(l2_normalize=False)
    _, database = case.given(case.raw.numpy())
    wanted = case.built.database
    assert not database.relative
    assert torch.equal(database.channels, wanted.channels)
    assert torch.equal(database.weights, wanted.weights)


@pytest.mark.parametrize("method", ["gradcam++", "proxy"])
def test_methods_that_need_pooled_activations_get_them_or_say_so(method: str) -> None:
    settings = {"channels": 50} if method == "proxy" else {"triplets": "all"}
    case = Case(method=method, **settings)
    with pytest.raises(ValueError, match=r"`pooled` must be given for method="):
        case.given()
    explainer, database = case.given(pooled=case.pooled.numpy())
    if method == "proxy":
        torch.testing.assert_close(database.proxies, case.built.database.proxies)
    else:
        assert_same_rows(database, case.built.database, scale=True)
    case.assert_same_maps(explainer)


def test_proxies_take_any_head() -> None:
    model, (images, labels) = other(), pictures(N)
    built = gcfast.Explainer(model, "backbone", method="proxy")
    wanted = built.build([(images, labels)])
    captured = Network(model, "backbone").embed(images)
    explainer = gcfast.Explainer(model, "backbone", method="proxy")
    got = explainer.build_from_embeddings(
        captured.output, labels, sample=images, check=(images[:2], [0, 1]),
        pooled=captured.activations.mean((2, 3)),
    )  # fmt: skip
    torch.testing.assert_close(got.proxies, wanted.proxies)


def test_another_head_is_refused_with_what_to_do() -> None:
    images, labels = pictures(N)
    explainer = gcfast.Explainer(other(), "backbone", channels=4)
    with pytest.raises(ValueError, match=r"global average pooling.*call build\(loader\)"):
        explainer.build_from_embeddings(
            torch.randn(N, 6), labels, sample=images, check=(images[:2], [0, 1])
        )


def test_raw_maps_of_rows_without_a_scale_are_refused_and_mixtures_warned_of(
    tmp_path: Path,
) -> None:
    case = Case()
    explainer, database = case.given(out=tmp_path / "db")
    assert database.relative
    assert read_manifest(tmp_path / "db")["format_version"] >= 5  # an older gcfast must not open it
    with pytest.raises(ValueError, match=r"`normalize` must be .* embeddings without their norms"):
        explainer.explain_batch(case.images[:1], normalize=None)
    opened = gcfast.Database.open(tmp_path / "db")
    assert opened.relative
    with pytest.warns(UserWarning, match="no scale of their own: with k=2"):
        case.explainer(k=2, database=opened).explain_batch(case.images[:1])
    other_ids = [f"other {i}" for i in range(N)]
    absolute = case.given(case.raw, ids=other_ids)[1]
    with pytest.raises(ValueError, match="relative is True and False"):
        gcfast.Database.merge(opened, absolute)


def test_a_folder_storage_and_overwriting_are_those_of_a_build(tmp_path: Path) -> None:
    case = Case()
    _, database = case.given(out=tmp_path / "db", storage="float16", preprocessing={"size": 8})
    assert database.path == tmp_path / "db"
    assert database.embeddings.dtype == torch.float16
    assert database.manifest["preprocessing"] == {"size": 8}
    assert database.manifest["from_embeddings"]["checked"] == 8
    with pytest.raises(FileExistsError):
        case.given(out=tmp_path / "db")
    case.given(out=tmp_path / "db", overwrite=True)
    with pytest.raises(ValueError, match="`overwrite` must be False without `out`"):
        case.given(overwrite=True)


EXACT = ["Flat", "HNSW8", "IVF4,Flat", "IDMap,Flat", "IDMap2,HNSW8", "SQ4,RFlat"]


@pytest.mark.parametrize("factory", EXACT)
def test_an_exact_index_gives_the_rows_of_its_vectors(factory: str) -> None:
    case = Case()
    index, ids = filled(case.unit, factory)
    before = faiss.serialize_index(index).tobytes()
    labels: Any = case.labels
    rows: Any = range(8)
    if ids is not None:
        labels = dict(zip(ids.tolist(), case.labels.tolist(), strict=True))
        rows = ids[:8]
    explainer, database = case.given(index, labels, check=(case.images[:8], rows))
    assert faiss.serialize_index(index).tobytes() == before
    if ids is None:
        assert_same_rows(database, case.built.database, scale=False)
    else:
        assert database.ids == [str(i) for i in sorted(ids.tolist())]
        assert torch.equal(database.embeddings, case.unit.flip(0))
    wanted = case.built if ids is None else turned(case)
    queries, _ = pictures(9)
    difference = wanted.explain_batch(queries) - explainer.explain_batch(queries)
    assert float(difference.abs().max()) <= SAME


def filled(vectors: Tensor, factory: str) -> tuple[Any, Any]:
    """An index of the vectors, and the ids it has them under where those are not row numbers."""
    array = vectors.numpy()
    index = faiss.index_factory(array.shape[1], factory)
    index.train(array)
    if "IDMap" not in factory:
        index.add(array)
        return index, None
    ids = 3 * np.arange(N)[::-1] + 5
    index.add_with_ids(array, ids)
    return index, ids


def turned(case: Case) -> gcfast.Explainer:
    """A build from the same images in the other order."""
    explainer = case.explainer()
    explainer.build([(case.images.flip(0), case.labels.flip(0))])
    return explainer


@pytest.mark.parametrize("factory", ["PCAR6,Flat", "L2norm,Flat", "SQfp16", "SQ8"])
def test_an_index_that_only_rounds_gives_nearly_the_same(factory: str) -> None:
    case = Case()
    _, database = case.given(filled(case.unit, factory)[0])  # no warning
    torch.testing.assert_close(database.embeddings, case.unit, rtol=0, atol=8e-3)


def test_a_compressed_index_is_warned_of_and_refused_below_the_bound() -> None:
    case = Case()
    with pytest.warns(UserWarning, match=r"cosine of only 0\.\d"):
        case.given(filled(case.unit, "PQ3x4")[0], min_cosine=0.3)
    rough = case.unit + 0.3 * torch.randn_like(case.unit)
    with pytest.raises(ValueError, match=r"row \d has a cosine of -?0\.\d+ .*at least 0\.95"):
        case.given(rough)
    with pytest.warns(UserWarning, match="cosine of only"):
        case.given(rough, min_cosine=-1.0)


def test_an_index_that_keeps_no_vectors_is_refused() -> None:
    case = Case()
    part, index = faiss.IndexFlatL2(6), faiss.IndexShards(6)
    part.add(case.unit.numpy())
    index.add_shard(part)
    refused("an index that gives its vectors back, got IndexShards", lambda: case.given(index))


def test_embeddings_that_lie_close_together_are_told_apart() -> None:
    case = Case()
    with torch.no_grad():
        case.model.head[1].bias += 5  # much larger than what tells images apart
    case.raw = case.raw + 5
    case.unit = torch.nn.functional.normalize(case.raw, dim=1)
    next_ones = case.unit.roll(1, 0)
    assert float((case.unit * next_ones).sum(1).min()) > 0.99
    refused("has a cosine of -", lambda: case.given(next_ones))
    case.given()  # the right ones


def refused(words: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    with warnings.catch_warnings(), pytest.raises(error, match=words):
        call()


def test_vectors_of_another_model_order_or_images_are_refused_with_the_cosine() -> None:
    case = Case()
    words = r"`embeddings` must be what the model gives .* has a cosine of -?\d\.\d+"
    refused(words, lambda: case.given(torch.randn(N, case.unit.shape[1])))
    refused(words, lambda: case.given(case.unit.roll(1, 0)))
    strangers = pictures(8)[0]
    refused(words, lambda: case.given(check=(strangers, range(8))))
    raw = Case(l2_normalize=False)
    refused("must be as long as", lambda: raw.given(raw.unit))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one check": ({"rows": [0]}, "`check` must be at least 2 images"),
    "no such row": ({"rows": [0, 70]}, "`check` must name rows that there are, got 70"),
    "no such id": ({"rows": ["0", "x"]}, "`check` must name rows that there are, got x"),
    "fewer labels": ({"labels": [0, 1]}, r"`labels` must have B = 60 elements, got 2"),
    "one class": ({"labels": [0] * N}, "at least two classes"),
    "mapping": ({"labels": {"0": 1}}, "`labels` must have every row, and lacks 1, 2"),
    "few ids": ({"ids": ["a"]}, "`ids` must have one for each of the 60 embeddings, got 1"),
    "twice": ({"ids": ["a"] * N}, "`ids` must be unique, got 'a' twice"),
    "few norms": ({"norms": torch.ones(3)}, "`norms` must have one for each"),
    "zero norms": ({"norms": torch.zeros(N)}, "`norms` must be finite and positive"),
    "other norms": ({"norms": torch.rand(N) + 0.1}, r"`norms` must be the lengths \|u\|"),
    "few pooled": ({"pooled": torch.ones(3, CHANNELS)}, "`pooled` must have one for each"),
    "width": ({"pooled": torch.ones(N, 2)}, f"`pooled` must have C = {CHANNELS} columns"),
    "other pooled": ({"pooled": torch.rand(N, CHANNELS)}, "`pooled` must be the layer's"),
    "pooled nan": ({"pooled": torch.full((N, CHANNELS), torch.nan)}, "`pooled` must be finite"),
    "one image twice": ({"rows": [3, 3]}, "and the row of each, not the same"),
    "a cosine of 2": ({"min_cosine": 2}, "`min_cosine` must be from -1 to 1"),
    "no cosine": ({"min_cosine": float("nan")}, "`min_cosine` must be from -1 to 1"),
    "no images": ({"sample": []}, "`sample` must give images"),
    "whole numbers": ({"embeddings": np.ones((N, 6), int)}, "must be floating-point numbers"),
    "flat": ({"embeddings": torch.ones(N)}, r"`embeddings` must have shape \[N, D\]"),
    "width of D": ({"embeddings": torch.rand(N, 3)}, "must have the model's D = "),
    "nan": ({"embeddings": torch.full((N, 6), torch.nan)}, "must be finite"),
    "zero": ({"embeddings": torch.zeros(N, 6)}, "must not be zero, got zeros in row 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_columns_are_refused(name: str) -> None:
    changes, words = WRONG[name]
    changes = dict(changes)
    case = Case()
    rows = changes.pop("rows", range(8))
    changes["check"] = (case.images[: len(rows)], rows)
    error = TypeError if name == "whole numbers" else ValueError
    refused(words, lambda: case.given(**changes), error)


def test_labels_are_needed_and_an_index_of_its_own_ids_takes_a_mapping() -> None:
    case = Case()
    explainer = case.explainer()
    with pytest.raises(ValueError, match="`labels` must be given"):
        explainer.build_from_embeddings(
            case.unit, sample=case.images, check=(case.images[:2], [0, 1])
        )
    index, ids = filled(case.unit, "IDMap,Flat")
    refused(
        "`labels` must be a mapping from the index's ids",
        lambda: case.given(index, check=(case.images[:2], ids[:2])),
    )


def test_rows_may_have_names_and_batches_may_come_as_a_loader_gives_them() -> None:
    case = Case()
    names = [f"picture {i}" for i in range(N)]
    _, database = case.given(
        labels=[f"class {i}" for i in case.labels.tolist()],
        ids=names,
        sample=loader(case.images, case.labels),
        check=(case.images[5:8], names[5:8]),
    )
    assert database.ids == names
    assert database.label_name(int(database.labels[1])) == "class 1"
    wanted = case.built.database.mean_activation
    torch.testing.assert_close(database.mean_activation, wanted)


def test_rows_without_a_scale_are_appended_to_with_further_images() -> None:
    case = Case()
    explainer, database = case.given(ids=[f"old {i}" for i in range(N)])
    further, labels = pictures(6)
    grown = explainer.append([(further, labels, [f"new {i}" for i in range(6)])])
    assert len(grown) == N + 6
    assert grown.relative
    assert torch.equal(grown.channels[:N], database.channels)
    whole = case.explainer()
    whole.build([(torch.cat([case.images, further]), torch.cat([case.labels, labels]))])
    # The new rows draw from all images, as the last ones of a build do.
    assert torch.equal(grown.channels[N:], whole.database.channels[N:])
