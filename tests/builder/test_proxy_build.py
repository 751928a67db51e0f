"""Databases of class proxies: built, continued, joined, cut and compressed, with exact sums."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forks import was_killed
from kill_builds import Countdown
from networks import Lambda, common, other, pictures
from torch import Tensor

import gcfast
from gcfast.builder import resumable
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.manifest import STATE

NAMES = ("robin", "wren", "tit")
COUNT, BATCH = 20, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    monkeypatch.setattr(resumable, "COMMIT_ROWS", 8)


def explainer(make: Any = common) -> gcfast.Explainer:
    return gcfast.Explainer(make(), "backbone", method="proxy")


def given(count: int = COUNT) -> tuple[Tensor, list[str], list[str]]:
    """Pictures with the classes robin, wren, tit, a class of two and one of one."""
    images, labels = pictures(count)
    names = [NAMES[i] for i in labels]
    names[2] = names[11] = "twin"
    names[9] = "alone"
    return images, names, [f"{name}/{i}" for i, name in enumerate(names)]


def batches(images: Tensor, names: list[str], ids: list[str], at: Any = None) -> list[Any]:
    """A loader of the pictures ``at``, in batches of their own size."""
    at = list(range(len(ids))) if at is None else list(at)
    return [
        (images[part], [names[i] for i in part], [ids[i] for i in part])
        for part in (at[i : i + BATCH] for i in range(0, len(at), BATCH))
    ]


def proxies_of(model: Any, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        r = F.normalize(model.backbone(images).double().mean((2, 3)), dim=1)
    means = {
        name: torch.stack([r[i] for i, own in enumerate(names) if own == name]).mean(0)
        for name in set(names)
    }
    center = torch.stack(list(means.values())).mean(0)
    return {name: mean - center for name, mean in means.items()}


def named(database: Database) -> dict[str, Tensor]:
    """The proxies by class name."""
    assert database.classes is not None
    labels = [database.label_name(label) for label in database.classes.labels.tolist()]
    return dict(zip(labels, database.proxies, strict=True))


def same_proxies(one: Database, two: Database) -> None:
    first, second = named(one), named(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.classes is not None
    assert two.classes is not None
    assert sorted(one.classes.counts.tolist()) == sorted(two.classes.counts.tolist())


def close_proxies(one: Database, two: Database) -> None:
    """As same_proxies, but for the rounding of a pass in other batches."""
    first, second = named(one), named(two)
    assert first.keys() == second.keys()
    for name, proxy in first.items():
        torch.testing.assert_close(proxy, second[name], atol=3e-7, rtol=0)
    assert one.classes is not None
    assert two.classes is not None
    assert sorted(one.classes.counts.tolist()) == sorted(two.classes.counts.tolist())


@pytest.mark.parametrize("make", [common, other], ids=["closed form", "autograd"])
def test_every_image_has_a_row_and_every_class_a_proxy(make: Any, tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(make), given()
    database = one.build(batches(images, names, ids))
    wanted = proxies_of(one.network.model, images, names)
    got = named(database)
    assert got.keys() == wanted.keys() == {*NAMES, "twin", "alone"}
    for name, proxy in wanted.items():
        torch.testing.assert_close(got[name], proxy.float(), atol=2e-7, rtol=0)
    assert database.report == {"images": COUNT, "rows": COUNT, "zero_rows": 0}
    assert "older_rows" not in database.manifest
    assert database.ids == ids
    written = one.build(batches(images, names, ids), out=tmp_path / "db")
    for opened in (written, Database.open(tmp_path / "db", verify=True)):
        same_proxies(opened, database)
        assert opened.report == database.report
        assert len(opened.shards) == 3
    entry = written.manifest["classes"]
    assert (tmp_path / "db" / entry["file"]).stat().st_size == entry["bytes"]


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_appending_is_a_build_of_all(folder: bool, tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    fresh = one.build(batches(images, names, ids))
    first, second = batches(images, names, ids, range(8)), batches(images, names, ids, range(8, 20))
    one.build(first, out=tmp_path / "db" if folder else None)
    together = one.append(second)
    same_proxies(together, fresh)
    assert together.report == fresh.report
    assert "older_rows" not in together.manifest
    assert torch.equal(together.embeddings, fresh.embeddings)
    queries = pictures(5)[0]
    maps = one.explain_batch(queries)
    one.database = fresh
    assert torch.equal(maps, one.explain_batch(queries))
    if folder:
        same_proxies(Database.open(tmp_path / "db", verify=True), fresh)
        assert len(list((tmp_path / "db").glob("classes-*"))) == 1


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_merging_is_a_build_of_all(folder: bool, tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    fresh = one.build(batches(images, names, ids))
    parts = [one.build(batches(images, names, ids, at)) for at in (range(12, 20), range(12))]
    merged = Database.merge(*parts, out=tmp_path / "db" if folder else None)
    same_proxies(merged, fresh)
    assert merged.report == fresh.report
    assert "older_rows" not in merged.manifest
    assert merged.class_names != fresh.class_names  # numbered anew


def test_centers_and_half_precision_keep_the_sums(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    one, (images, names, ids) = explainer(), given()
    whole = one.build(batches(images, names, ids))
    small = whole.compress(6)
    same_proxies(small, whole)
    small.save(tmp_path / "small", storage="float16")
    whole.save(tmp_path / "half", storage="float16")
    for name, rows in (("small", len(small)), ("half", COUNT)):
        opened = Database.open(tmp_path / name, verify=True)
        same_proxies(opened, whole)
        assert (len(opened), opened.embeddings.dtype) == (rows, torch.float16)
        again = gcfast.load(tmp_path / name, one.network.model)
        assert not again.explain_batch(images, details=True).flat.all()
    same_proxies(whole.in_storage("float16"), whole)
    direct = one.build(batches(images, names, ids), storage="float16")
    same_proxies(direct, whole)


def test_a_killed_build_gives_the_same_bits(tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    fresh = one.build(batches(images, names, ids))

    def build(folder: Path, kill_at: int) -> None:
        countdown = Countdown(kill_at)
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, countdown.around(getattr(os, name)))
        one.network.model.register_forward_hook(lambda *_: countdown.step())
        one.build(batches(images, names, ids), out=folder)

    for kill_at in range(7, 400, 19):
        folder = tmp_path / str(kill_at)
        killed = was_killed(lambda at=kill_at, to=folder: build(to, at))
        if not killed:
            break
        if not (folder / "manifest.json").exists():
            one.build(batches(images, names, ids), out=folder, resume=True)
        resumed = Database.open(folder, verify=True)
        same_proxies(resumed, fresh)
        assert torch.equal(resumed.embeddings, fresh.embeddings)
        assert not (folder / STATE).exists()
    assert not killed
    assert kill_at > 40  # it was, a few times


def test_whole_classes_go_without_images(tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    left = [i for i, name in enumerate(names) if name not in ("wren", "twin")]
    gone = [id for i, id in enumerate(ids) if i not in left]
    database = one.build(batches(images, names, ids), out=tmp_path / "db")
    fresh = one.build(batches(images, names, ids, left))
    changed = database.remove(gone)
    same_proxies(changed, fresh)
    assert changed.report == {"images": COUNT, "rows": len(left), "zero_rows": 0, "removed": 9}
    with pytest.raises(gcfast.GcfastError, match=r"a part of tit would stay: .* Explainer.remove"):
        changed.remove([ids[names.index("tit")]])


def test_whole_classes_get_another_label_without_images(tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    renamed = ["pair" if name == "twin" else "robin" if name == "wren" else name for name in names]
    database = one.build(batches(images, names, ids), out=tmp_path / "db")
    changed = database.relabel(
        {id: new for id, old, new in zip(ids, names, renamed, strict=True) if old != new}
    )
    same_proxies(changed, one.build(batches(images, renamed, ids)))
    assert "older_rows" not in changed.manifest
    for labels in ({ids[0]: "wren"}, {ids[2]: "wren", ids[11]: "tit"}):
        with pytest.raises(gcfast.GcfastError, match=r"would stay: give .* Explainer\.relabel"):
            changed.relabel(labels)


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_rows_go_with_what_their_images_added(folder: bool, tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    gone = [0, 3, 9, 11, 17]  # of four classes, one of which loses all
    left = [i for i in range(COUNT) if i not in gone]
    fresh = one.build(batches(images, names, ids, left))
    one.build(batches(images, names, ids), out=tmp_path / "db" if folder else None)
    changed = one.remove(batches(images, names, ids, gone[::-1]))
    assert one.database is changed
    close_proxies(changed, fresh)
    assert changed.ids == [ids[i] for i in left]
    assert changed.report["zero_rows"] == 0
    if folder:
        close_proxies(Database.open(tmp_path / "db", verify=True), fresh)


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_rows_change_classes_with_what_their_images_added(folder: bool, tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    new = list(names)
    new[0], new[2], new[9], new[13] = "tit", "robin", "wren", "new"
    fresh = one.build(batches(images, new, ids))
    one.build(batches(images, names, ids), out=tmp_path / "db" if folder else None)
    changed = one.relabel(batches(images, new, ids, [13, 2, 9, 0, 5]))  # the last keeps its own
    close_proxies(changed, fresh)
    assert [changed.label_name(label) for label in changed.labels.tolist()] == new
    if folder:
        close_proxies(Database.open(tmp_path / "db", verify=True), fresh)


def test_other_images_are_not_taken_for_the_rows() -> None:
    one, (images, names, ids) = explainer(), given()
    for call in (one.remove, one.relabel):
        with pytest.raises(gcfast.NoDatabaseError, match="there is no database to re"):
            call([])
    database = one.build(batches(images, names, ids))
    other_images = images.clone()
    other_images[3] *= -1
    for call in (one.remove, one.relabel):
        with pytest.raises(ValueError, match=r"got another one for '.*/3': its embedding differs"):
            call(batches(other_images, names, ids, [2, 3]))
        with pytest.raises(ValueError, match="got no ids to say whose rows they are"):
            call([(images[:2], names[:2])])
        with pytest.raises(ValueError, match="has none of nobody"):
            call([(images[:2], names[:2], ["nobody", ids[1]])])
        with pytest.raises(ValueError, match="must name at least one row"):
            call([])
    assert one.database is database


def test_images_without_activations_count_in_no_class() -> None:
    model = common()
    forward = model.backbone.forward

    def blank(images: Tensor) -> Tensor:
        return forward(images) * (images.flatten(1)[:, 0] != 7)[:, None, None, None]

    model.backbone = Lambda(blank)
    one, (images, names, ids) = explainer(lambda: model), given()
    images[[1, 4, 9], 0, 0, 0] = 7  # a wren twice, and the only one of its class
    with_blank = one.build(batches(images, names, ids))
    assert with_blank.report["zero_rows"] == 3
    assert torch.equal(named(with_blank)["alone"], torch.zeros(12))
    kept = [i for i in range(COUNT) if i not in (1, 4, 9)]
    plain = named(one.build(batches(images, names, ids, kept)))
    for name, proxy in plain.items():
        torch.testing.assert_close(named(with_blank)[name], proxy, atol=1e-7, rtol=0)
    images[:, 0, 0, 0] = 7
    with pytest.raises(ValueError, match="the mean activations of all 20 rows are zero: the layer"):
        one.build(batches(images, names, ids))


def test_a_manifest_without_its_classes_is_damaged(tmp_path: Path) -> None:
    one, (images, names, ids) = explainer(), given()
    database = one.build(batches(images, names, ids), out=tmp_path / "db")
    path = tmp_path / "db" / "manifest.json"
    file = tmp_path / "db" / database.manifest["classes"]["file"]
    content = file.read_bytes()
    file.write_bytes(content[:-8] + b"changed!")
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"classes file .* checksum differs"):
        Database.open(tmp_path / "db")
    file.unlink()
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"classes file .* is missing"):
        Database.open(tmp_path / "db")
    manifest = json.loads(path.read_text())
    del manifest["classes"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(gcfast.DamagedDatabaseError, match="it names no file of the classes"):
        Database.open(tmp_path / "db")
