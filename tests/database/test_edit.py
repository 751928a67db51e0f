"""Removing, relabelling and merging rows: in memory and on disk, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import was_killed
from kill_builds import Countdown
from networks import common, loader, pictures

import gcfast
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.shards import FIELDS

N = 18
NAMES = ("robin", "wren", "tit")
STORED = pytest.mark.parametrize("stored", ["in memory", "in a folder"])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


@pytest.fixture
def model() -> torch.nn.Module:
    return common()


def built(
    model: torch.nn.Module,
    out: Path | None = None,
    *,
    names: tuple[Any, ...] = NAMES,
    ids: Callable[[int], str] = lambda i: f"img{i}",
    **options: Any,
) -> Database:
    settings = {"channels": 5, "triplets": 3} | options.pop("settings", {})
    images, labels = pictures(N)
    batches = [
        (
            images[i : i + 6],
            [names[n] for n in labels[i : i + 6]],
            [ids(j) for j in range(i, i + 6)],
        )
        for i in range(0, N, 6)
    ]
    return gcfast.Explainer(model, "backbone", **settings).build(batches, out=out, **options)


def same_rows(one: Database, rows: list[int], two: Database, *but: str) -> None:
    for field in FIELDS:
        if field not in but:
            assert torch.equal(getattr(one, field), getattr(two, field)[rows]), field


# --- remove


@STORED
def test_remove(model: torch.nn.Module, tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    whole = built(model, out)
    images, _ = pictures(4)
    one = gcfast.Explainer(model, database=whole)
    one.database = whole.remove(["img5", "img0", "img8", "img9", "img10", "img11"])
    left = [i for i in range(N) if i not in (0, 5, 8, 9, 10, 11)]
    database = one.database
    assert database is not None
    same_rows(database, left, whole)
    assert list(database.ids) == [f"img{i}" for i in left]
    assert database.class_names == list(NAMES)
    assert len(whole) == N  # a reader keeps what it opened
    report = database.report
    assert (report["images"], report["rows"], report["removed"]) == (N, 12, 6)
    # What the rows that stay have drawn from is no longer all there.
    assert database.manifest["older_rows"] == 12
    found = one.explain_batch(images, details=True).neighbors
    distances = one.explain_batch(images, details=True).embeddings @ database.embeddings.T
    assert found[:, 0].tolist() == distances.argmax(1).tolist()
    if out is not None:
        assert database.path == out
        # The shard without rows is gone, those that lost none are as they were.
        assert [s["rows"] for s in database.manifest["shards"]] == [3, 3, 4, 2]
        assert sorted(p.name for p in out.iterdir() if p.name.startswith("rows")) == [
            "rows-00003.safetensors",
            "rows-00004.safetensors",
            "rows-00005.safetensors",
            "rows-00006.safetensors",
        ]
        same_rows(Database.open(out, verify=True), left, whole)
    again = database.remove(["img1"])
    assert again.report["removed"] == 7


@STORED
def test_append_after_remove(model: torch.nn.Module, tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    one = gcfast.Explainer(model, "backbone", channels=5, triplets=3)
    images, labels = pictures(N)
    one.database = one.build(loader(images, labels), out=out).remove(["3", "4"])
    together = one.append(loader(*pictures(3)))
    assert list(together.ids[-3:]) == ["18", "19", "20"]  # never a number that was given away
    assert together.manifest["older_rows"] == N - 2


@STORED
def test_zero_rows_and_hardest_triplets_that_go_are_counted(
    model: torch.nn.Module, tmp_path: Path, stored: str
) -> None:
    whole = built(model)
    tensors = {field: getattr(whole, field).clone() for field in FIELDS}
    tensors["weights"][:2] = 0
    tensors["triplet_counts"][1:4] = 0
    manifest = whole.manifest | {"report": whole.report | {"zero_rows": 2, "hardest_triplet": 3}}
    database = Database(tensors, list(whole.ids), manifest)
    if stored == "in a folder":
        database.save(tmp_path / "db")
    report = database.remove(["img1", "img2"]).report
    assert (report["zero_rows"], report["hardest_triplet"]) == (1, 1)


@pytest.mark.parametrize("how", ["remove", "relabel"])
def test_what_cannot_be_changed(model: torch.nn.Module, tmp_path: Path, how: str) -> None:
    whole = built(model, tmp_path / "db")

    def change(database: Database, ids: Any) -> Database:
        if how == "remove":
            return database.remove(ids)
        return database.relabel(dict.fromkeys(ids, "tit") if isinstance(ids, list) else ids)

    with pytest.raises(ValueError, match=r"has none of nobody, no: `database.ids` lists them"):
        change(whole, ["img1", "nobody", "no"])
    with pytest.raises(ValueError, match="must name at least one row, got none"):
        change(whole, [])
    with pytest.raises(TypeError, match=r"must (hold ids, which are strings|map ids to labels)"):
        change(whole, {3} if how == "relabel" else [3])
    with pytest.raises(TypeError, match=r"must be several ids|must map ids to labels"):
        change(whole, "img1")
    if how == "remove":
        with pytest.raises(ValueError, match="name each row once, got 'img1' twice"):
            whole.remove(["img1", "img2", "img1"])
        with pytest.raises(ValueError, match="must leave a row, got the ids of all 18"):
            whole.remove(whole.ids)
    pytest.importorskip("faiss")
    with pytest.raises(gcfast.GcfastError, match="change the whole one, and compress it"):
        change(whole.compress(3), ["img1"])
    two = Database.open(tmp_path / "db")
    change(whole, ["img1"])
    with pytest.raises(gcfast.GcfastError, match="has changed since it was opened: open it again"):
        change(two, ["img2"])


# --- relabel


@STORED
def test_relabel(model: torch.nn.Module, tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    whole = built(model, out)
    database = whole.relabel({"img13": "owl", "img0": "tit", "img14": "owl"})
    same_rows(database, list(range(N)), whole, "labels")
    names = [database.label_name(label) for label in database.labels.tolist()]
    wanted = [NAMES[i % 3] for i in range(N)]
    wanted[0], wanted[13], wanted[14] = "tit", "owl", "owl"
    assert names == wanted
    assert database.class_names == [*NAMES, "owl"]
    assert database.manifest["older_rows"] == N  # their triplets were of the labels before
    assert list(database.ids) == list(whole.ids)
    if out is not None:
        assert len(Database.open(out, verify=True).class_names) == 4
        before = {s["file"] for s in whole.manifest["shards"]}
        assert len(before & {s["file"] for s in database.manifest["shards"]}) == 3


def test_relabel_numbers(model: torch.nn.Module) -> None:
    whole = built(model, names=(4, 9, 2))
    database = whole.relabel({"img1": 7, "img2": 4})
    assert database.labels[:3].tolist() == [4, 7, 4]
    assert database.class_names == []
    with pytest.raises(TypeError, match="got both: 'owl' after int labels"):
        whole.relabel({"img1": "owl"})
    with pytest.raises(TypeError, match="got both: 3 after str labels"):
        built(model).relabel({"img1": 3})


# --- what is dropped


@pytest.mark.parametrize("how", ["remove", "relabel"])
def test_the_index_and_the_calibration_go_with_a_word(
    model: torch.nn.Module, tmp_path: Path, how: str
) -> None:
    pytest.importorskip("faiss")
    whole = built(model, tmp_path / "db")
    whole.build_index("Flat")
    manifest = json.loads((tmp_path / "db" / "manifest.json").read_text())
    manifest["calibration"] = {"a": 1}
    (tmp_path / "db" / "manifest.json").write_text(json.dumps(manifest))
    whole = Database.open(tmp_path / "db")
    if how == "remove":
        with pytest.warns(UserWarning, match="stored index and the calibration .* dropped"):
            database = whole.remove(["img1"])
        assert not list((tmp_path / "db").glob("index-*"))
        with pytest.raises(gcfast.NoDatabaseError, match="there is no index"):
            database.read_index()
    else:
        with pytest.warns(UserWarning, match="the calibration .* dropped"):
            database = whole.relabel({"img1": "owl"})
        assert database.read_index().ntotal == N  # the embeddings are the same
    assert "calibration" not in Database.open(tmp_path / "db").manifest


# --- merge


def two(model: torch.nn.Module, **options: Any) -> tuple[Database, Database]:
    return (
        built(model, ids=lambda i: f"a{i}", **options),
        built(model, ids=lambda i: f"b{i}", names=("tit", "owl", "wren"), **options),
    )


@STORED
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_merge(model: torch.nn.Module, tmp_path: Path, stored: str, storage: str) -> None:
    a, b = two(model, storage=storage)
    out = tmp_path / "db" if stored == "in a folder" else None
    database = Database.merge(a, b, out=out)
    assert database.path == out
    for rows, part in ((slice(0, N), a), (slice(N, 2 * N), b)):
        for field in ("embeddings", "channels", "triplet_counts"):
            assert torch.equal(getattr(database, field)[rows], getattr(part, field)), field
        torch.testing.assert_close(database.weights[rows], part.weights, rtol=1e-3, atol=0)
        names = [database.label_name(i) for i in database.labels[rows].tolist()]
        assert names == [part.label_name(i) for i in part.labels.tolist()]
    assert database.class_names == ["robin", "wren", "tit", "owl"]
    assert list(database.ids) == [*a.ids, *b.ids]
    torch.testing.assert_close(
        database.mean_activation, (a.mean_activation + b.mean_activation) / 2
    )
    torch.testing.assert_close(
        database.offsets, (database.weights * database.mean_activation[database.channels]).sum(1)
    )
    assert database.manifest["older_rows"] == 2 * N
    assert (database.report["images"], database.report["rows"]) == (2 * N, 2 * N)
    assert (len(a), len(b)) == (N, N)
    one = gcfast.Explainer(model, database=database, channels=5, triplets=3)
    why = one.explain_batch(pictures(3)[0], details=True)
    wanted = (why.embeddings @ database.embeddings.float().T).argmax(1)
    assert why.neighbors[:, 0].tolist() == wanted.tolist()
    assert len(one.append(loader(*pictures(3)[:1], ["owl"] * 3))) == 2 * N + 3
    if out is not None:
        with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
            Database.merge(a, b, out=out)
        assert len(Database.merge(a, b, out=out, overwrite=True)) == 2 * N


def test_merged_ids_are_unique_or_named(model: torch.nn.Module) -> None:
    a, b = built(model), built(model)
    with pytest.raises(ValueError, match=r"different ids, got 'img0' for more than one row: give"):
        Database.merge(a, b)
    database = Database.merge(a, b, prefixes=["one/", "two/"])
    assert list(database.ids) == [f"{p}/img{i}" for p in ("one", "two") for i in range(N)]
    with pytest.raises(ValueError, match="one for each of the 2 databases, got 1"):
        Database.merge(a, b, prefixes=["one/"])
    # Paths from different folders are told from the folder that has both.
    a.manifest["preprocessing"] = {"size": 8, "images": "/data/old/birds"}
    b.manifest["preprocessing"] = {"size": 8, "images": "/data/new"}
    database = Database.merge(a, b)
    assert (database.ids[0], database.ids[N]) == ("old/birds/img0", "new/img0")
    assert database.manifest["preprocessing"] == {"size": 8, "images": "/data"}


def test_what_cannot_be_merged(model: torch.nn.Module) -> None:
    a, _ = two(model)
    for other, words in (
        (built(model, ids=str, storage="float16"), "storage is 'float32' and 'float16'"),
        (built(model, ids=str, settings={"channels": 4}), "channels is 5 and 4"),
        (built(model, ids=str, settings={"evidence": "against"}), "evidence is 'for' and 'against"),
        (built(model, ids=str, preprocessing={"size": 9}), "preprocessing is None and {'size': 9}"),
        (built(model, ids=str, names=(1, 2, 3)), "kind of labels is 'names' and 'numbers'"),
    ):
        with pytest.raises(ValueError, match=f"number 2 and the first .*{words}"):
            Database.merge(a, other)
    with pytest.raises(gcfast.ModelMismatchError, match="number 2 is of another than the first"):
        Database.merge(a, built(common(), ids=str))
    with pytest.raises(TypeError, match=r"must be gcfast.Database, got str; .*open reads one"):
        Database.merge(a, "db")
    with pytest.raises(ValueError, match="two or more, got 1"):
        Database.merge(a)
    pytest.importorskip("faiss")
    with pytest.raises(gcfast.GcfastError, match="a compressed database cannot be merged"):
        Database.merge(a, a.compress(3))


# --- ids of a build


@STORED
def test_ids_are_unique(model: torch.nn.Module, tmp_path: Path, stored: str) -> None:
    out = tmp_path / "db" if stored == "in a folder" else None
    with pytest.raises(ValueError, match=r"must be unique, got 'a' for images 3 and 17: give"):
        built(model, out, ids=lambda i: "a" if i in (3, 17) else str(i))
    one = gcfast.Explainer(model, "backbone", channels=5, triplets=3)
    one.build(loader(*pictures(N)), out=out and tmp_path / "two")
    images, labels = pictures(3)
    with pytest.raises(ValueError, match="must be new to the database, got '4', which row 4 has"):
        one.append([(images, labels, ["x", "4", "y"])])
    with pytest.raises(ValueError, match="`ids` must be unique, got 'x' for images 18 and 20"):
        one.append([(images, labels, ["x", "z", "x"])])
    assert len(one.append([(images, labels, ["x", "y", "z"])])) == N + 3


# --- killed at any step


def changes(how: str, folder: Path) -> None:
    if how == "merge":
        Database.merge(
            Database.open(folder),
            Database.open(folder.with_name("other")),
            out=folder,
            overwrite=True,
        )
    elif how == "remove":
        Database.open(folder).remove(["img1", "img9", "img17"])
    else:
        Database.open(folder).relabel({"img1": "owl", "img9": "owl"})


@pytest.mark.parametrize(
    "how", ["remove", "relabel", pytest.param("merge", marks=pytest.mark.slow)]
)
def test_killed_at_any_step_it_leaves_the_old_or_the_new(
    model: torch.nn.Module, tmp_path: Path, how: str
) -> None:
    built(model, tmp_path / "whole" / "db")
    built(model, tmp_path / "whole" / "other", ids=lambda i: f"b{i}")
    changed = {"remove": (N - 3, 3), "relabel": (N, 4), "merge": (2 * N, 3)}[how]
    point, found, killed = 0, [], True
    while killed:
        point += 1
        root = tmp_path / str(point)
        shutil.copytree(tmp_path / "whole", root)
        reader = Database.open(root / "db")

        def run(point: int = point, root: Path = root) -> None:
            countdown = Countdown(point)
            for name in ("fsync", "rename", "unlink"):
                setattr(os, name, countdown.around(getattr(os, name)))
            changes(how, root / "db")

        killed = was_killed(run)
        now = Database.open(root / "db", verify=True)
        found.append((len(now), len(now.class_names)))
        assert len(reader.weights) == N
        if found[-1] != changed:
            changes(how, root / "db")
            now = Database.open(root / "db", verify=True)
        else:
            now.relabel({"img0": "wren"})  # the next writer deletes what was left
        names = {p.name for p in (root / "db").iterdir()}
        now = Database.open(root / "db", verify=True)
        assert names == {"manifest.json", *(s["file"] for s in now.manifest["shards"])}
        assert (len(now), len(now.class_names)) == changed
        shutil.rmtree(root)
    assert point > 8
    assert set(found) == {(N, 3), changed}
    assert found == sorted(found, key=lambda f: f == changed)
