"""method="proxy": maps by the formula written out, from any head, index and graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import AFFINE_HEADS, CHANNELS, OTHER_HEADS, Net, TokenNet, common, loader, pictures
from torch import Tensor, nn

import gcfast
from gcfast.search.faiss_search import temperature

IMAGES, CLASSES = 22, 4


def built(
    model: nn.Module, layer: str = "backbone", **settings: Any
) -> tuple[gcfast.Explainer, Tensor, Tensor]:
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(model, layer, method="proxy", **settings)
    one.build(loader(images, labels))
    return one, images, labels


def proxies(activations: Tensor, labels: Tensor) -> Tensor:
    x = activations.double().mean((2, 3))
    r = x / x.norm(dim=1, keepdim=True)
    means = torch.stack([r[labels == k].mean(0) for k in labels.unique()])
    return means - means.mean(0)


def maps(activations: Tensor, a: Tensor, size: tuple[int, int] = (8, 8)) -> Tensor:
    """The map of each image by its vector a [C]."""
    made = []
    for A, vector in zip(activations.double(), a, strict=True):
        x = A.mean((1, 2))
        q = x / x.norm()
        w = vector - 0.5 * q * (q @ vector)
        cam = torch.einsum("c,chw->hw", w, A).clamp(min=0)
        made.append(cam / cam.max() if cam.max() > 0 else cam)
    cams = torch.stack(made)[:, None]
    return F.interpolate(cams, size=size, mode="bilinear", align_corners=False)[:, 0].float()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "linear": AFFINE_HEADS["linear"],
    **{name: OTHER_HEADS[name] for name in ("gem", "flatten", "mlp")},
}


@pytest.mark.parametrize("head", HEADS)
def test_maps_are_the_formula_whatever_the_head(head: str) -> None:
    model = Net(HEADS[head](CHANNELS))
    one, images, labels = built(model)
    queries = pictures(7, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    with torch.no_grad():
        a = proxies(model.backbone(images), labels)[why.labels[:, 0]]
        close(why.maps, maps(model.backbone(queries), a))
    assert len(set(why.labels[:, 0].tolist())) > 1
    assert not why.flat.all()


def test_tokens() -> None:
    model = TokenNet()
    one, images, labels = built(model, "first", reshape=gcfast.TokenGrid(prefix=1))
    queries = pictures(5, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    with torch.no_grad():

        def grid(x: Tensor) -> Tensor:
            tokens = model.first(model.patch(x).flatten(2).transpose(1, 2))
            return tokens.transpose(1, 2).unflatten(2, (4, 4))

        a = proxies(grid(images), labels)[why.labels[:, 0]]
        close(why.maps, maps(grid(queries), a))


def test_a_head_that_needs_autograd_takes_one_pass() -> None:
    images, labels = pictures(IMAGES, CLASSES)
    one = gcfast.Explainer(Net(OTHER_HEADS["gem"](CHANNELS)), "backbone", method="proxy")
    database = one.build(iter(loader(images, labels)))
    assert len(database) == IMAGES
    assert database.m == 0


def mixed(one: gcfast.Explainer, images: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """The maps of K neighbors, their classes mixed by the shares of their distances."""
    assert one.database is not None
    model = one.network.model
    why = one.explain_batch(queries, details=True)
    assert (why.labels != why.labels[:, :1]).any()
    tau = temperature(one.database.embeddings, one.k)
    shares = torch.softmax(-why.distances.double() / tau, 1)
    with torch.no_grad():
        a = proxies(model.backbone(images), labels)[why.labels]
        return maps(model.backbone(queries), (shares[..., None] * a).sum(1))


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_classes_of_several_neighbors_are_mixed(index: str) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    one, images, labels = built(common(), k=4, index=index)
    queries = pictures(9, CLASSES)[0]
    close(one.explain_batch(queries), mixed(one, images, labels, queries))


@pytest.mark.parametrize("k", [1, 3])
def test_an_index_finds_the_same(k: int, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    one, *_ = built(common(), k=k)
    assert one.database is not None
    one.database.save(tmp_path / "db")
    queries = pictures(9, CLASSES)[0]
    wanted = one.explain_batch(queries, details=True)
    other = gcfast.load(tmp_path / "db", one.network.model, index="Flat", k=k)
    got = other.explain_batch(queries, details=True)
    assert torch.equal(got.neighbors, wanted.neighbors)
    assert torch.equal(got.labels, wanted.labels)
    torch.testing.assert_close(got.maps, wanted.maps, atol=1e-5, rtol=0)
    (streamed,) = other.explain_stream([queries])
    assert torch.equal(streamed, got.maps)


def test_missing_neighbors_weigh_nothing() -> None:
    one, *_ = built(common(), k=IMAGES + 3)
    queries = pictures(4, CLASSES)[0]
    why = one.explain_batch(queries, details=True)
    assert (why.labels[:, IMAGES:] == -1).all()
    assert torch.isfinite(why.maps).all()
    assert not why.flat.all()


@pytest.mark.parametrize("k", [1, 3])
def test_exported_maps_are_equal(k: int) -> None:
    one, *_ = built(common(), k=k)
    queries = pictures(6, CLASSES)[0]
    wanted = one.explain_batch(queries, details=True)
    module = one.export(details=True)
    got = module(queries)
    for a, b in zip(got, (wanted.maps, wanted.embeddings), strict=False):
        assert torch.equal(a, b)
    assert torch.equal(got[4], wanted.labels)
    program = torch.export.export(module, (queries,))
    torch.testing.assert_close(program.module()(queries)[0], wanted.maps)
    torch.compiler.reset()  # exported modules are all one function, whose graphs it limits
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries)[0], wanted.maps)


@pytest.mark.parametrize("k", [1, 2])
def test_what_is_not_finite_is_marked_where_nothing_waits(k: int) -> None:
    one, *_ = built(common(), k=k)
    queries = pictures(3, CLASSES)[0]
    queries[1, 0, 0, 0] = torch.nan
    maps = one.export()(queries)
    assert torch.isnan(maps[1]).all()
    assert torch.isfinite(maps[[0, 2]]).all()
    with pytest.raises(ValueError, match="`images`"):
        one.explain_batch(queries)


def test_a_label_is_explained_by_its_own_proxy() -> None:
    one, images, labels = built(common())
    model = one.network.model
    queries = pictures(5, CLASSES)[0]
    asked = torch.tensor([3, 0, 2, 1, 55])
    got = one.explain_labelled(queries, asked)
    with torch.no_grad():
        a = proxies(model.backbone(images), labels)[asked.clamp(max=3)]
        wanted = maps(model.backbone(queries), a)
    close(got[:4], wanted[:4])
    assert (got[4] == 0).all()  # no row has it
    nearest = one.explain_batch(queries, details=True)
    assert torch.equal(one.explain_labelled(queries, nearest.labels[:, 0]), nearest.maps)


def test_map_options_hold() -> None:
    one, *_ = built(common())
    queries = pictures(3, CLASSES)[0]
    signed = one.explain_batch(queries, relu=False, normalize=None, size=4)
    raw = one.explain_batch(queries, normalize=None, size=4)
    assert (signed < 0).any()
    torch.testing.assert_close(raw, signed.clamp(min=0))


def test_what_has_no_meaning_is_refused() -> None:
    one, images, labels = built(common())
    message = "`center` must be left out with method='proxy'"
    for call in (one.explain_batch, lambda x, **o: next(one.explain_stream([x], **o))):
        with pytest.raises(ValueError, match=message):
            call(images, center=0.5)
    with pytest.raises(ValueError, match=message):
        one.export(center=1.0)
    with pytest.raises(ValueError, match="to explain a triplet, got 'proxy'"):
        one.explain_triplet(images[:1], images[1:2], images[2:3])
    gradients = gcfast.Explainer(one.network.model, "backbone", channels=5)
    with pytest.raises(gcfast.ModelMismatchError, match="method='proxy', not with 'gradcam': give"):
        gradients.database = one.database  # type: ignore[assignment]
    database = gradients.build(loader(images, labels))
    with pytest.raises(gcfast.ModelMismatchError, match="method='gradcam', not with 'proxy'"):
        one.database = database
    with pytest.raises(gcfast.GcfastError, match="a database of gradients has no class proxies"):
        _ = database.proxies


def test_calibration_compares_with_the_labels_proxies() -> None:
    one, *_ = built(common())
    queries, labels = pictures(30, CLASSES)
    fidelity = one.calibrate(loader(queries, labels))
    why = one.explain_batch(queries, details=True)
    right = why.labels[:, 0] == labels
    assert right.any()
    torch.testing.assert_close(fidelity.cosine[right], (~why.flat[right]).float())
    assert fidelity.control is not None
    assert fidelity.control.mean() < fidelity.cosine.mean()
    assert why.confidence is not None
