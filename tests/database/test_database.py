"""The folder format: whole or not at all, and refused where it is not what was written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CHANNELS, Lambda, common, loader, other, pictures
from torch import nn

import gcfast
from gcfast.database import manifest as manifest_module
from gcfast.database import shards as shards_module
from gcfast.database.database import Database
from gcfast.database.shards import FIELDS
from gcfast.explain import default as default_module


def built(count: int = 9, **settings: Any) -> tuple[gcfast.Explainer, Database]:
    settings.setdefault("channels", 5)
    one = gcfast.Explainer(common(), "backbone", **settings)
    return one, one.build(loader(*pictures(count)))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of three shards."""
    monkeypatch.setattr(shards_module, "SHARD_ROWS", 4)
    path = tmp_path / "birds.gcfast"
    built()[1].save(path)
    return path


def edit(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


# --- there and back


@pytest.mark.parametrize("rows", [4, 9, 65_536], ids=["three shards", "full shard", "one shard"])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(shards_module, "SHARD_ROWS", rows)
    images, labels = pictures(9)
    names = [("robin", "wren", "tit")[i] for i in labels]
    ids = [f"a/{i} ü \udcff.jpg" for i in range(9)]
    one = gcfast.Explainer(common(), "backbone", channels=5)
    database = one.build([(images, names, ids)], preprocessing={"size": 8})
    path = tmp_path / "deep" / "birds.gcfast"
    database.save(path)
    again = Database.open(path)
    for field in FIELDS:
        assert torch.equal(getattr(again, field), getattr(database, field)), field
        assert getattr(again, field).dtype == getattr(database, field).dtype
    assert again.ids == ids
    assert again.class_names == ["robin", "wren", "tit"]
    assert again.label_name(2) == "tit"
    assert again.label_name(-1) == ""
    assert again.report == database.report
    assert again.path == database.path == path
    assert again.manifest == database.manifest
    assert again.manifest["preprocessing"] == {"size": 8}
    assert len(list(path.glob("rows-*.safetensors"))) == -(-9 // min(rows, 9))
    assert sorted(p.name for p in path.parent.iterdir()) == ["birds.gcfast"]
    assert len(again) == 9


def test_labels_that_are_numbers_are_their_own_names() -> None:
    _, database = built()
    assert database.label_name(7) == "7"
    assert database.label_name(-1) == "", "there is none"
    assert "9 rows" in repr(database)


def test_rows_are_memory_mapped(tmp_path: Path) -> None:
    _, database = built()
    database.save(tmp_path / "db")
    again = Database.open(tmp_path / "db")
    assert str(tmp_path / "db" / "rows-00000.safetensors") in Path("/proc/self/maps").read_text()
    assert torch.equal(again.embeddings, database.embeddings)


def test_load_gives_the_same_maps_and_sets_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_module, "_default", None)
    objective = gcfast.TripletLoss(0.7)
    one, database = built(
        objective=objective, method="gradcam++", triplets="all", evidence="against", seed=4
    )
    database.save(tmp_path / "db")
    images, labels = pictures(3)
    loaded = gcfast.load(tmp_path / "db", one.network.model)
    assert loaded.layer_name == "backbone"
    assert loaded.settings.describe() == one.settings.describe()
    assert torch.equal(loaded.explain_batch(images), one.explain_batch(images))
    assert torch.equal(gcfast.explain_batch(images), one.explain_batch(images))
    assert gcfast.explain_batch(images, details=True).neighbors.shape == (3, 1)
    torch.testing.assert_close(
        loaded.explain_labelled(images, labels), one.explain_labelled(images, labels)
    )
    other_k = gcfast.load(tmp_path / "db", one.network.model, k=3, evidence="for")
    assert (other_k.k, other_k.settings.evidence) == (3, "for")


@pytest.mark.parametrize(
    "objective",
    [
        gcfast.DistanceDifference(),
        gcfast.PairDistance("negative"),
        lambda a, p, n: (a - p).square().sum(1) + 0 * n.sum(1),
    ],
    ids=["difference", "pair", "function"],
)
def test_objectives_come_back(tmp_path: Path, objective: Any) -> None:
    one, database = built(objective=objective)
    database.save(tmp_path / "db")
    images, labels = pictures(3)
    loaded = gcfast.load(tmp_path / "db", one.network.model)
    assert torch.equal(loaded.explain_batch(images), one.explain_batch(images))
    if isinstance(objective, gcfast.Objective):
        assert loaded.settings.objective.describe() == objective.describe()
        return
    with pytest.raises(ValueError, match=r"`objective` must be given: .* which is not stored"):
        loaded.explain_labelled(images, labels)
    given = gcfast.load(tmp_path / "db", one.network.model, objective=objective)
    given.explain_labelled(images, labels)


def test_output_key_and_l2_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(common(), Lambda(lambda x: (x[:, :1], x)))
    one = gcfast.Explainer(model, "0.backbone", channels=5, output_key=1, l2_normalize=False)
    images, labels = pictures(6)
    one.build([(images, labels)]).save(tmp_path / "db")
    loaded = gcfast.load(tmp_path / "db", model)
    assert torch.equal(loaded.explain_batch(images), one.explain_batch(images))


# --- overwriting


def test_an_existing_database_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "db"
    built(9)[1].save(path)
    _, new = built(6)
    with pytest.raises(FileExistsError, match=r"got the database .*; overwrite=True replaces it"):
        new.save(path)
    assert len(Database.open(path)) == 9
    new.save(path, overwrite=True)
    assert len(Database.open(path)) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["db"]


def test_an_open_database_can_be_saved_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "db"
    _, database = built()
    database.save(path)
    again = Database.open(path)
    again.save(path, overwrite=True)
    assert torch.equal(again.weights, database.weights)
    assert torch.equal(Database.open(path).weights, database.weights)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_database_is_never_replaced(tmp_path: Path, kind: str, overwrite: bool) -> None:
    path = tmp_path / "thesis"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "chapter").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"thesis, not a gcfast database"):
        built()[1].save(path, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


# --- a disk that fails


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_failing_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool, call: str
) -> None:
    path = tmp_path / "db"
    if old:
        built(9)[1].save(path)
    _, new = built(6)
    calls = [0]
    real = getattr(os, call)
    # Of an old one's four, the last is that of the folder that has got a new name in it.
    fails = {"fsync": 4, "rename": 2}[call] if old else 1

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=r"cannot write the database .*db: No space left") as caught:
        new.save(path, overwrite=True)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == (["db"] if old else [])
    if old:
        assert len(Database.open(path)) == 9
    new.save(path, overwrite=True)
    assert len(Database.open(path)) == 6


FULL = """
import resource, sys
import torch
from test_database import built
database = built(9)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    database.save(sys.argv[1])
except OSError as error:
    print("OSError:", error)
"""


def test_a_file_that_the_system_cuts_off_leaves_nothing(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "db")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write the database" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_safetensors_cannot_open_is_refused_before_the_work(tmp_path: Path) -> None:
    one, database = built()
    path = tmp_path / os.fsdecode(b"caf\xe9")
    for name, write in (
        ("path", lambda: database.save(path)),
        ("out", lambda: one.build([], out=path)),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must be a path in UTF-8, got .*caf"):
            write()
    assert list(tmp_path.iterdir()) == []


# --- damage


def test_overwrite_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    _, database = built(6)
    other = tmp_path / "site"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "x"}')
    with pytest.raises(FileExistsError, match="site, not a gcfast database"):
        database.save(other, overwrite=True)
    database.save(tmp_path / "db")
    (tmp_path / "db" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds thesis\.tex"):
        database.save(tmp_path / "db", overwrite=True)
    assert (tmp_path / "db" / "thesis.tex").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["db", "site"]


def test_a_missing_database(tmp_path: Path) -> None:
    with pytest.raises(gcfast.NoDatabaseError, match=r"there is no database at .*: it is not a"):
        Database.open(tmp_path / "none")
    with pytest.raises(gcfast.NoDatabaseError, match=r"manifest.json is missing"):
        Database.open(tmp_path)


def test_a_missing_shard(saved: Path) -> None:
    (saved / "rows-00001.safetensors").unlink()
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"rows-00001.safetensors is missing"):
        Database.open(saved)


def test_a_truncated_shard(saved: Path) -> None:
    shard = saved / "rows-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    with pytest.raises(
        gcfast.DamagedDatabaseError,
        match=rf"truncated or changed: {size} bytes were written, it has {size - 10}",
    ):
        Database.open(saved, verify=False)


def test_an_edited_shard(saved: Path) -> None:
    shard = saved / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"is changed: its checksum differs"):
        Database.open(saved)


def test_an_unreadable_shard_that_is_not_verified(saved: Path) -> None:
    shard = saved / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[:8] = b"\xff" * 8
    shard.write_bytes(content)
    with pytest.raises(gcfast.DamagedDatabaseError, match="cannot be read"):
        Database.open(saved, verify=False)


def test_a_shard_with_other_rows_than_listed(saved: Path) -> None:
    shards = json.loads((saved / "manifest.json").read_text())["shards"]
    shards[0]["rows"] = 5
    edit(saved, shards=shards)
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"must hold 5 rows, got \[4\]"):
        Database.open(saved)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "something"}, "its format is 'something'"),
    "version": ({"format_version": "one"}, "is damaged"),
    "no shards": ({"shards": []}, "it lists no shards"),
    "shards": ({"shards": 3}, "'shards' must be a list, got 3"),
    "shard": ({"shards": ["rows-00000.safetensors"]}, "is damaged"),
    "shard's file": ({"shards": [{"rows": 4, "bytes": 1, "sha256": ""}]}, "it lacks 'file'"),
    "shard elsewhere": (
        {"shards": [{"file": "../x", "rows": 4, "bytes": 1, "sha256": ""}]},
        "a shard must lie in the folder, got '../x'",
    ),
    "settings": ({"settings": None}, "'settings' must be a dict, got None"),
    "fingerprint": ({"fingerprint": "abc"}, "'fingerprint' must be a dict, got 'abc'"),
    "class names": ({"class_names": {"a": 1}}, "'class_names' must be a list"),
    "members": ({"members": {"file": "m", "bytes": 1}}, "it lacks 'sha256'"),
    "members elsewhere": (
        {"members": {"file": "../m", "bytes": 1, "sha256": ""}},
        "the members file must lie in the folder, got '../m'",
    ),
    "index": ({"index": "index.faiss"}, "the index must be a dict, got 'index.faiss'"),
    "index's rows": (
        {"index": {"file": "i", "bytes": 1, "sha256": "", "rows": "4", "factory": "Flat"}},
        "the index's 'rows' must be a int",
    ),
    "scale": ({"weight_scale": 0}, "'weight_scale' must be positive and finite, got 0"),
    "storage": ({"storage": "int8"}, "'storage' must be float32 or float16, got 'int8'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest(saved: Path, name: str) -> None:
    changes, words = BROKEN[name]
    edit(saved, **changes)
    with pytest.raises(
        gcfast.DamagedDatabaseError, match=f"manifest.json is damaged: .*{words}|{words}"
    ):
        Database.open(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"format": 1'], ids=str)
def test_a_manifest_that_is_not_ours(saved: Path, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"manifest.json is damaged"):
        Database.open(saved)


@pytest.mark.parametrize("key", sorted(manifest_module.MANIFEST_KEYS))
def test_a_manifest_that_lacks_something(saved: Path, key: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest[key]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(gcfast.DamagedDatabaseError, match=f"is damaged: it lacks '{key}'"):
        Database.open(saved)


def test_a_newer_format(saved: Path) -> None:
    newer = manifest_module.FORMAT_VERSION + 1
    edit(saved, format_version=newer)
    with pytest.raises(
        gcfast.GcfastError, match=rf"was written in format {newer}, .* install a newer one"
    ):
        Database.open(saved)


# --- of another model


def test_a_database_of_another_model_is_refused(tmp_path: Path) -> None:
    one, database = built()
    database.save(tmp_path / "db")
    with pytest.raises(gcfast.ModelMismatchError, match=r"another model .*: other parameters"):
        gcfast.load(tmp_path / "db", common())
    with pytest.raises(gcfast.ModelMismatchError, match=r"another model .*: another architecture"):
        gcfast.load(tmp_path / "db", other())
    with pytest.raises(gcfast.ModelMismatchError, match="layer 'backbone', which the model lacks"):
        gcfast.load(tmp_path / "db", nn.Sequential(nn.Conv2d(3, 4, 3)))
    half = one.network.model.half()
    with pytest.warns(UserWarning, match="in float32, and this one is in float16"):
        gcfast.load(tmp_path / "db", half)


def test_a_database_of_another_layer_is_refused() -> None:
    one, database = built()
    with pytest.raises(
        gcfast.ModelMismatchError, match=r"layer 'backbone', not with 'backbone.stem'"
    ):
        gcfast.Explainer(one.network.model, "backbone.stem", database)


def test_a_database_of_other_normalisation_is_refused() -> None:
    one, database = built()
    with pytest.raises(gcfast.ModelMismatchError, match="l2_normalize=True, not with False"):
        gcfast.Explainer(one.network.model, database=database, l2_normalize=False)


def test_an_explainer_without_layer_takes_its_databases() -> None:
    model = common()
    database = gcfast.Explainer(model, "backbone.stem", channels=5).build(loader(*pictures(6)))
    given = gcfast.Explainer(model, database=database)
    later = gcfast.Explainer(model)
    later.database = database
    for one in (given, later):
        assert one.layer_name == "backbone.stem"
        assert one.explain_batch(pictures(2)[0]).shape == (2, 8, 8)
    refused = gcfast.Explainer(common())
    with pytest.raises(gcfast.ModelMismatchError, match="other parameters"):
        refused.database = database
    assert refused.layer_name is None
    assert refused.database is None


def test_the_weights_of_every_channel_are_kept(tmp_path: Path) -> None:
    _, database = built(channels="all")
    database.save(tmp_path / "db")
    assert Database.open(tmp_path / "db").channels.shape == (9, CHANNELS)


def test_a_database_is_pickled_as_its_path(tmp_path: Path) -> None:
    one, database = built()
    with pytest.raises(TypeError, match="a database in memory cannot be pickled: save it"):
        pickle.dumps(database)
    with pytest.raises(TypeError, match="a database in memory cannot be pickled: save it"):
        pickle.dumps(one)
    database.save(tmp_path / "db")
    assert torch.equal(pickle.loads(pickle.dumps(database)).embeddings, database.embeddings)


def test_an_explainer_is_pickled_with_its_model_and_the_databases_path(tmp_path: Path) -> None:
    one, database = built()
    database.save(tmp_path / "db")
    one.database = gcfast.Database.open(tmp_path / "db")
    other, images = pickle.loads(pickle.dumps(one)), pictures(3)[0]
    assert torch.equal(other.explain_batch(images), one.explain_batch(images))
    assert repr(other) == repr(one)
    assert repr(one) == (
        f"Explainer(Net, layer='backbone', method='gradcam', evidence='for', {len(database)} rows)"
    )
