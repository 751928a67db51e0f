"""The second search, maps of several objects, and the log-ratio that a confidence rests on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import GeM, Net, TokenNet, common, loader, other, pictures
from torch import Tensor, nn

import gcfast
from gcfast.explain.result import Finish

CLASSES = 3


def built(model: nn.Module, **settings: Any) -> tuple[gcfast.Explainer, Tensor]:
    """An Explainer of 30 rows, and pictures of two classes side by side."""
    images, labels = pictures(54, CLASSES)
    one = gcfast.Explainer(model, "backbone", channels=6, **settings)
    one.build(loader(images[:30], labels[:30]))
    mixed = torch.cat([images[30:42, :, :, :4], images[42:, :, :, 4:]], 3)
    return one, mixed


def embedded(one: gcfast.Explainer, pooled: Tensor) -> Tensor:
    """What the head makes of pooled activations, given as maps of one pixel."""
    head = one.network.model.head
    assert isinstance(head, nn.Module)
    return F.normalize(head(pooled[:, :, None, None]).detach(), dim=1)


def coarse(one: gcfast.Explainer, images: Tensor, row: int, i: int) -> Tensor:
    """The map of image i by a row, in plain PyTorch, divided by its maximum."""
    assert one.database is not None
    maps = one.network.embed(images[i : i + 1]).activations[0]
    weights = torch.zeros(len(maps))
    weights[one.database.channels[row]] = one.database.weights[row].float()
    cam = torch.einsum("c,chw->hw", weights, maps).clamp(min=0)
    return cam / cam.max().clamp(min=1e-12)


def near(hot: Tensor, database: gcfast.Database, label: int) -> tuple[Tensor, Tensor, int]:
    """1 - cosine of the best row of a class and of all others, and which row the latter is."""
    far = 1 - database.embeddings.double() @ hot.double()
    same = database.labels == label
    other = far.masked_fill(same, torch.inf)
    return far[same].min(), other.min(), int(other.argmin())


@pytest.mark.parametrize("make", [common, lambda: Net(GeM())], ids=["closed form", "GeM"])
def test_another_class_takes_over_where_it_is_nearer_to_the_hot_pixels(make: Any) -> None:
    one, images = built(make(), requery=True)
    plain = gcfast.Explainer(one.network.model, database=one.database, channels=6)
    database = one.database
    assert database is not None
    first = plain.explain_batch(images, details=True)
    again = one.explain_batch(images, details=True)
    changed = 0
    for i in range(len(images)):
        row = int(first.neighbors[i, 0])
        heat = coarse(one, images, row, i).square()
        maps = one.network.embed(images[i : i + 1]).activations[0]
        pooled = torch.einsum("chw,hw->c", maps, heat) / heat.sum()
        hot = embedded(one, pooled[None])[0]
        own, rest, nearest = near(hot, database, int(database.labels[row]))
        wanted = nearest if own / rest >= 1.25 else row
        changed += wanted != row
        assert int(again.neighbors[i, 0]) == wanted
        beyond = (first.embeddings[i] - database.embeddings[wanted]).square().sum()
        torch.testing.assert_close(again.distances[i, 0], beyond, atol=1e-5, rtol=1e-4)
        small = one.explain_batch(images, size=maps.shape[1:])[i]
        torch.testing.assert_close(small, coarse(one, images, wanted, i), atol=1e-4, rtol=1e-4)
    assert 0 < changed < len(images)  # the pictures try both
    assert torch.equal(again.labels, database.labels[again.neighbors])


def test_the_log_ratio_is_of_the_class_that_is_shown() -> None:
    one, images = built(common(), requery=True)
    database = one.database
    assert database is not None
    attached = one.attach(images=images, rates=True)
    out = attached.explain(images, Finish.checked(images), rates=True)
    plain = gcfast.Explainer(one.network.model, database=database, channels=6)
    first = plain.explain_batch(images, details=True).neighbors[:, 0]
    assert out.ratios is not None
    for i, row in enumerate(first.tolist()):
        heat = coarse(one, images, row, i).square()
        maps = one.network.embed(images[i : i + 1]).activations[0]
        hot = embedded(one, (torch.einsum("chw,hw->c", maps, heat) / heat.sum())[None])[0]
        shown = int(database.labels[out.neighbors[i, 0]])
        own, rest, _ = near(hot, database, shown)
        wanted = (rest.clamp(min=1e-4) / own.clamp(min=1e-4)).log()
        assert float(out.ratios[i]) == pytest.approx(float(wanted), abs=1e-3)


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_objects_are_peeled_one_after_another(index: str) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    one, images = built(common(), index=index)
    database = one.database
    assert database is not None
    got = one.explain_objects(images, 3, size=4)
    first = one.explain_batch(images, size=4, details=True)
    assert got.maps.shape == (len(images), 3, 4, 4)
    assert torch.equal(got.maps[:, 0], first.maps)
    assert torch.equal(got.neighbors[:, 0], first.neighbors[:, 0])
    for i in range(len(images)):
        maps = one.network.embed(images[i : i + 1]).activations[0]
        cold = torch.ones(maps.shape[1:])
        for number in range(1, 3):
            cold = cold * (1 - coarse(one, images, int(got.neighbors[i, number - 1]), i)) ** 4
            rest = embedded(one, (torch.einsum("chw,hw->c", maps, cold) / cold.sum())[None])[0]
            row = int(got.neighbors[i, number])
            distances = (database.embeddings - rest).square().sum(1)
            assert float(distances[row]) == pytest.approx(float(distances.min()), abs=1e-5)
            assert float(got.distances[i, number]) == pytest.approx(
                float(distances.min()), abs=1e-4
            )
            assert int(got.labels[i, number]) == int(database.labels[row])
            wanted = coarse(one, images, row, i)
            torch.testing.assert_close(got.maps[i, number], wanted, atol=1e-4, rtol=1e-4)


def test_no_images_and_one_object() -> None:
    one, images = built(common())
    none = one.explain_objects(images[:0], 2)
    assert [tuple(t.shape) for t in none] == [(0, 2, 8, 8), (0, 2), (0, 2), (0, 2)]
    alone = one.explain_objects(images, 1)
    assert torch.equal(alone.maps[:, 0], one.explain_batch(images))


def test_streams_look_again_too() -> None:
    one, images = built(common(), requery=True)
    (streamed,) = one.explain_stream([images], details=True)
    whole = one.explain_batch(images, details=True)
    assert torch.equal(streamed.neighbors, whole.neighbors)
    assert torch.equal(streamed.maps, whole.maps)


def test_what_cannot_be_looked_at_again_is_refused() -> None:
    for settings, why in (
        ({"k": 2}, r"needs k=1, got k=2"),
        ({"index": "Flat"}, "needs index='exact', got 'Flat'"),
        ({"objective": gcfast.RankLoss(nn.Linear(6, 2))}, "real numbers for labels"),
    ):
        with pytest.raises(ValueError, match=f"`requery` must be False: .*{why}"):
            gcfast.Explainer(common(), "backbone", requery=True, **settings)
    with pytest.raises(TypeError, match="`requery` must be a bool, got 'yes'"):
        gcfast.Explainer(common(), requery="yes")  # type: ignore[arg-type]
    one, images = built(common(), requery=True)
    with pytest.raises(ValueError, match="`requery` must be False to be exported"):
        one.export()
    with pytest.raises(ValueError, match="`objects` must be at least 1, got 0"):
        one.explain_objects(images, 0)


def test_tokens_that_are_not_averaged_are_refused() -> None:
    images, labels = pictures(12, size=(16, 16))
    one = gcfast.Explainer(TokenNet(), channels=6)
    one.build(loader(images, labels))
    with pytest.raises(ValueError, match=r"gives tokens.*pooled activations cannot be embedded"):
        one.explain_objects(images)
    fidelity = one.calibrate(loader(images + 0.3, labels))
    assert fidelity.ratios is None
    assert "no confidence: the layer" in str(fidelity)
    why = one.explain_batch(images, details=True)
    assert why.confidence is None
    assert why.fidelity is not None


def test_other_heads_run_the_model_again() -> None:
    one, images = built(other(), requery=True)
    assert one.explain_batch(images).shape == (12, 8, 8)
