"""Agreement of transferred maps with own maps, and the confidence that is read off it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import common, loader, other, pictures
from torch import Tensor

import gcfast
from gcfast.database.shards import FIELDS
from gcfast.explain import attached, second_look
from gcfast.explain.calibration import Calibration, Fidelity, calibrated, transfer_fidelity
from gcfast.explain.confidence import Confidence
from gcfast.metrics import cosine, spearman
from gcfast.metrics.controls import random_rows


def built(make: object = common) -> tuple[gcfast.Explainer, Tensor, Tensor]:
    """An Explainer with a database of 12 rows, and 24 other pictures of its classes."""
    images, labels = pictures(36)
    one = gcfast.Explainer(make(), "backbone", channels=6)  # type: ignore[operator]
    one.build(loader(images[:12], labels[:12]))
    return one, images[12:], labels[12:]


def test_fit_by_hand() -> None:
    distances = torch.arange(40.0)
    agreement = torch.cat([torch.full((10,), v) for v in (0.9, 0.5, 0.7, 0.2)])
    fitted = Calibration.fit(distances[torch.randperm(40, generator=torch.Generator())], agreement)
    assert (fitted.agreement.diff() < 0).all()
    fitted = Calibration.fit(distances, agreement)
    # The groups at 14.5 and 24.5 would rise and are pooled.
    assert fitted.distances.tolist() == pytest.approx([4.5, 19.5, 34.5])
    assert fitted.agreement.tolist() == pytest.approx([0.9, 0.6, 0.2])
    asked = torch.tensor([0.0, 4.5, 12.0, 27.0, 99.0, torch.inf])
    wanted = [0.9, 0.9, 0.75, 0.4, 0.2, 0.0]
    assert fitted.fidelity(asked).tolist() == pytest.approx(wanted)


def test_one_knot_is_a_constant() -> None:
    fitted = Calibration.fit(torch.arange(10.0), torch.full((10,), 0.25))
    assert fitted.distances.tolist() == [4.5]
    assert fitted.fidelity(torch.tensor([0.0, 4.5, 9.0])).tolist() == [0.25] * 3
    assert fitted.fidelity(torch.zeros(0)).shape == (0,)


def test_confidence_never_rises_with_distance() -> None:
    distances, agreement = torch.rand(333), torch.rand(333)
    values = Calibration.fit(distances, agreement).fidelity(torch.linspace(-1, 2, 500))
    assert (values.diff() <= 1e-7).all()


def test_fit_refuses_in_words() -> None:
    with pytest.raises(ValueError, match="`distances` must be of at least 10 images, got 9"):
        Calibration.fit(torch.rand(9), torch.rand(9))
    with pytest.raises(ValueError, match="`agreement` must be finite, got NaN or infinity in row"):
        Calibration.fit(torch.rand(10), torch.full((10,), torch.nan))
    with pytest.raises(ValueError, match=r"`agreement` must have shape \[n\] with n = 10"):
        Calibration.fit(torch.rand(10), torch.rand(9))


@pytest.mark.parametrize("make", [common, other], ids=["closed form", "autograd"])
def test_fidelity_is_the_agreement_of_the_two_maps(make: object) -> None:
    one, images, labels = built(make)
    fidelity = transfer_fidelity(one, loader(images, labels))
    why = one.explain_batch(images, details=True)
    own = one.explain_labelled(images, labels)
    torch.testing.assert_close(fidelity.distances, why.distances[:, 0])
    torch.testing.assert_close(fidelity.cosine, cosine(why.maps, own), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fidelity.spearman, spearman(why.maps, own), rtol=1e-2, atol=1e-2)
    assert len(fidelity) == 24
    assert (fidelity.flat, fidelity.unknown) == (0, 0)


def test_other_classes_are_counted() -> None:
    one, images, labels = built()
    fidelity = transfer_fidelity(one, loader(images, torch.where(labels == 2, 7, labels)))
    assert (len(fidelity), fidelity.unknown) == (16, 8)
    with pytest.raises(ValueError, match="of the database's classes, got 24 of others"):
        transfer_fidelity(one, loader(images, labels + 10))
    with pytest.raises(ValueError, match="of the database's classes, got none"):
        transfer_fidelity(one, [])


def test_a_class_that_lost_its_rows_is_counted() -> None:
    images, labels = pictures(36)
    names = [("a", "b", "c")[i] for i in labels]
    one = gcfast.Explainer(common(), "backbone", channels=6)
    whole = one.build(loader(images[:12], names[:12]))
    kept = torch.nonzero(whole.labels != 1).flatten()
    tensors = {field: getattr(whole, field)[kept] for field in FIELDS}
    one.database = gcfast.Database(tensors, [whole.ids[i] for i in kept], whole.manifest)
    fidelity = transfer_fidelity(one, loader(images[12:], names[12:]))
    assert (len(fidelity), fidelity.unknown, fidelity.flat) == (16, 8, 0)


def test_confidence_comes_with_the_details(tmp_path: Path) -> None:
    one, images, labels = built()
    assert one.explain_batch(images, details=True).confidence is None
    assert one.explain_batch(images[:0], details=True).confidence is None
    fidelity = one.calibrate(loader(images, labels))
    why = one.explain_batch(images, details=True)
    fitted = Calibration.fit(fidelity.distances, fidelity.cosine)
    assert why.confidence is not None
    assert why.fidelity is not None
    assert why.confidence.dtype == why.fidelity.dtype == torch.float32
    torch.testing.assert_close(why.fidelity, fitted.fidelity(why.distances[:, 0]))
    assert fidelity.right is not None
    assert fidelity.ratios is not None
    right = Confidence.fit(fidelity.ratios, fidelity.right)
    torch.testing.assert_close(why.confidence, right(fidelity.ratios), rtol=1e-4, atol=1e-5)
    assert torch.equal(fidelity.right, why.labels[:, 0] == labels)
    # Calibrated: over the images they were fitted to, both are right on average.
    assert float(why.fidelity.mean()) == pytest.approx(float(fidelity.cosine.mean()), abs=0.05)
    share = float(fidelity.right.float().mean())
    assert float(why.confidence.mean()) == pytest.approx(share, abs=0.05)
    nothing = one.explain_batch(images[:0], details=True).confidence
    assert nothing is not None
    assert nothing.shape == (0,)

    assert one.database is not None
    one.database.save(tmp_path / "db")
    opened = gcfast.load(tmp_path / "db", one.network.model)
    again = opened.explain_batch(images, details=True).confidence
    assert again is not None
    torch.testing.assert_close(again, why.confidence)


def test_calibrating_makes_no_index_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    images, labels = pictures(36)
    one = gcfast.Explainer(common(), "backbone", channels=6, index="Flat")
    one.build(loader(images[:12], labels[:12]))
    before = one.explain_batch(images[12:], details=True)
    monkeypatch.setattr(attached, "make_transfer", None)
    one.calibrate(loader(images[12:], labels[12:]))
    after = one.explain_batch(images[12:], details=True)
    assert torch.equal(after.maps, before.maps)
    assert after.fidelity is not None
    assert after.confidence is None  # it takes an exact search


def test_what_cannot_calibrate_is_refused() -> None:
    images, labels = pictures(12)
    one = gcfast.Explainer(common(), "backbone", channels=6)
    with pytest.raises(gcfast.NoDatabaseError, match="no database"):
        one.calibrate(loader(images, labels))
    one.build(loader(images, labels))
    with pytest.raises(ValueError, match="not built from, got 12 of 12 at distance 0"):
        one.calibrate(loader(images, labels))
    few = Fidelity(torch.ones(4), torch.ones(4), torch.ones(4), 0, 0)
    with pytest.raises(ValueError, match="at least 10 images of the database's classes, got 4"):
        calibrated(few)
    assert one.explain_batch(images, details=True).confidence is None


def test_maps_alone_take_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    one, images, labels = built()
    one.calibrate(loader(images, labels))
    wanted = one.explain_batch(images, details=True).maps
    monkeypatch.setattr(second_look, "nearest_by_class", None)
    assert torch.equal(one.explain_batch(images), wanted)
    (streamed,) = one.explain_stream([images])
    assert torch.equal(streamed, wanted)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_random_row_is_measured_beside(storage: str) -> None:
    one, images, labels = built()
    assert one.database is not None
    one.database = one.database.in_storage(storage)
    fidelity = one.calibrate(loader(images, labels))
    rows = random_rows(torch.arange(24), 12, one.settings.seed)
    database = one.database
    lent = gcfast.ops.sparse_cam(
        one.network.embed(images).activations,
        rows[:, None],
        database.channels,
        database.weights,
        size=(8, 8),
    )
    wanted = cosine(lent, one.explain_labelled(images, labels))
    assert fidelity.control is not None
    torch.testing.assert_close(fidelity.control, wanted, rtol=1e-4, atol=1e-4)
    kept = Calibration.from_manifest(database.manifest)
    assert kept is not None
    assert kept.control == pytest.approx(float(wanted.mean()), abs=1e-4)
    # Where it was measured before there was a control, there is none.
    before = {k: v for k, v in kept.to_dict().items() if k != "control"}
    old = Calibration.from_manifest({"calibration": before})
    assert old is not None
    assert old.control is None
    assert old.to_dict() == before


def test_fidelity_in_words() -> None:
    control = torch.full((8,), 0.25)
    one = Fidelity(torch.arange(8.0), torch.linspace(1, 0.3, 8), torch.ones(8), 0, 0, control)
    lines = str(one).splitlines()
    assert len(lines) == 5
    assert lines[1] == (
        "fidelity at distance 2.000 to 3.000: cosine 0.750, Spearman 1.000, "
        "cosine of a random row 0.250 (2 images)"
    )
    assert lines[4] == "fidelity of the nearest row 0.650, of a random row 0.250: +0.400"
    right = torch.arange(8) != 3
    rated = Fidelity(*[torch.arange(8.0)] * 3, 0, 0, right=right, ratios=torch.arange(8.0))
    assert str(rated).splitlines()[-1] == (
        "the map's class is right in 87.5%; right from wrong (AUROC): 0.571 by the confidence, "
        "0.429 by the distance"
    )
    rated = replace(rated, right=right | True)
    assert str(rated).endswith("the map's class is right in 100.0%; nothing to tell apart")
    bare = str(Fidelity(torch.ones(1), torch.ones(1), torch.ones(1), 0, 0))
    assert bare == "fidelity at distance 1.000 to 1.000: cosine 1.000, Spearman 1.000 (1 images)"


@pytest.mark.parametrize("where", ["in memory", "saved before", "saved after"])
def test_new_rows_leave_the_calibration_behind(tmp_path: Path, where: str) -> None:
    one, images, labels = built()
    stored = one.database
    assert stored is not None
    if where == "saved before":
        stored.save(tmp_path / "db")
    one.calibrate(loader(images[:12], labels[:12]))
    if where == "saved after":
        stored.save(tmp_path / "db")
        assert "calibration" in gcfast.Database.open(tmp_path / "db").manifest
    with pytest.warns(UserWarning, match="calibration was of the rows before these and is dropped"):
        together = one.append(loader(images[12:18], labels[12:18]))
    assert one.explain_batch(images, details=True).confidence is None
    assert "calibration" not in together.manifest
    assert "calibration" in stored.manifest  # it still is of these rows
    if where != "in memory":
        opened = gcfast.load(tmp_path / "db", one.network.model)
        assert opened.explain_batch(images, details=True).confidence is None
    one.append(loader(images[18:], labels[18:]))  # no warning where nothing is lost
    one.calibrate(loader(images[:12] + 0.1, labels[:12]))
    assert one.explain_batch(images, details=True).confidence is not None


def test_other_rows_have_no_calibration(tmp_path: Path) -> None:
    one, images, labels = built()
    one.calibrate(loader(images[:12], labels[:12]))
    assert one.database is not None
    one.database.save(tmp_path / "db", storage="float16")  # the same rows, rounded
    assert "calibration" in gcfast.Database.open(tmp_path / "db").manifest
    one.rebuild(loader(images, labels))
    assert one.explain_batch(images, details=True).confidence is None


def test_centres_are_calibrated_anew() -> None:
    pytest.importorskip("faiss")
    one, images, labels = built()
    one.calibrate(loader(images[:12], labels[:12]))
    assert one.database is not None
    one.database = one.database.compress(4)
    assert one.explain_batch(images, details=True).confidence is None
    fidelity = one.calibrate(loader(images[:12], labels[:12]))
    why = one.explain_batch(images[:12], details=True)
    torch.testing.assert_close(fidelity.distances, why.distances[:, 0])
    assert why.confidence is not None


@pytest.mark.parametrize(
    "kept",
    [
        {"distances": [0.0, 1.0], "agreement": [1.0], "images": 9},
        {"distances": [1.0, 0.0], "agreement": [1.0, 0.5], "images": 9},
        {"distances": [], "agreement": [], "images": 9},
        {"distances": ["a"], "agreement": [1.0], "images": 9},
        {"agreement": [1.0]},
        {"distances": [0.0], "agreement": [1.0], "images": 9, "control": float("nan")},
        {"distances": [0.0], "agreement": [1.0], "images": 9, "right": {"offset": 1.0}},
        [3],
    ],
    ids=str,
)
def test_a_damaged_calibration_is_named(kept: object) -> None:
    with pytest.raises(gcfast.DamagedDatabaseError, match="the calibration in the manifest"):
        Calibration.from_manifest({"calibration": kept})
    assert Calibration.from_manifest({}) is None
