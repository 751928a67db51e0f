"""An opened database: shard by shard, nothing read before it is needed, damage told in words."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forks import forked
from helpers import resident
from networks import common, loader, pictures
from test_database import built, edit

import gcfast
from gcfast.database import database as database_module
from gcfast.database import shards as shards_module
from gcfast.database.database import Database
from gcfast.database.shards import FIELDS, Shard
from gcfast.database.write import write_tensors


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Database:
    """A database of three shards once it is saved, in memory."""
    monkeypatch.setattr(shards_module, "SHARD_ROWS", 4)
    return built()[1]


@pytest.fixture
def saved(fresh: Database, tmp_path: Path) -> Path:
    fresh.save(tmp_path / "db")
    return tmp_path / "db"


def test_shards_are_the_rows_in_order(fresh: Database, saved: Path) -> None:
    shards = Database.open(saved).shards
    assert [len(shard.labels) for shard in shards] == [4, 4, 1]
    for field in FIELDS:
        parts = [getattr(shard, field) for shard in shards]
        assert all(part.is_contiguous() for part in parts)
        assert torch.equal(torch.cat(parts), getattr(fresh, field))
    (whole,) = fresh.shards
    assert whole.embeddings is fresh.embeddings


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (1, 3), (3, 5), (2, 9), (8, 99)])
def test_rows_across_shards(fresh: Database, saved: Path, start: int, stop: int) -> None:
    rows = Database.open(saved).rows(start, stop)
    assert isinstance(rows, Shard)
    for field in FIELDS:
        assert torch.equal(getattr(rows, field), getattr(fresh, field)[start:stop])


def test_ids_are_a_sequence(saved: Path) -> None:
    ids = Database.open(saved).ids
    names = [str(i) for i in range(9)]
    assert ids == names
    assert ids == Database.open(saved).ids
    assert ids != names[:8]
    assert ids != "012345678"
    assert list(ids) == names
    assert (ids[0], ids[-1], ids[3], ids[4]) == ("0", "8", "3", "4")
    assert ids[2:7] == names[2:7]
    assert ids[::-3] == names[::-3]
    assert ids[5:2] == []
    assert ids.index("7") == 7
    assert repr(ids) == "Ids(9: '0', '1', '2', …)"
    with pytest.raises(IndexError, match="`ids` has 9 elements, got 9"):
        ids[9]


def test_ten_million_rows_open_at_once(tmp_path: Path) -> None:
    rows = 16_384
    tensors = {
        "embeddings": torch.zeros(rows, 128),
        "channels": torch.zeros(rows, 50, dtype=torch.int64),
        "weights": torch.zeros(rows, 50),
        "offsets": torch.zeros(rows),
        "labels": torch.zeros(rows, dtype=torch.int64),
        "triplet_counts": torch.zeros(rows, dtype=torch.int64),
        "id_ends": torch.arange(1, rows + 1),
        "id_bytes": torch.full((rows,), 97, dtype=torch.uint8),
    }
    one = tmp_path / "one.safetensors"
    safetensors.torch.save_file(tensors, one)
    folder = tmp_path / "db"
    folder.mkdir()
    entries = []
    for number in range(611):
        name = f"rows-{number:05d}.safetensors"
        os.link(one, folder / name)
        entries.append({"file": name, "rows": rows, "bytes": one.stat().st_size, "sha256": ""})
    _, database = built()
    (folder / "manifest.json").write_text(json.dumps(database.manifest | {"shards": entries}))

    before, cpu, files = resident(), time.process_time(), open_files()
    opened = Database.open(folder)
    spent, grown = time.process_time() - cpu, resident() - before
    assert len(opened) == 611 * rows > 10**7
    assert repr(opened).startswith("Database(10010624 rows, D=128, M=50")
    assert opened.ids[10_000_000] == "a"
    assert spent < 1, f"{spent:.2f} s"
    assert grown < 8 * 2**20, f"{grown / 2**20:.1f} MiB"
    assert open_files() == files
    with pytest.raises(gcfast.DamagedDatabaseError, match="checksum differs"):
        _ = opened.shards


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- damage


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_checksums_of_a_large_database_are_compared_at_first_use(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "VERIFY_BYTES", 1000)
    whole = Database.open(saved)
    assert torch.equal(whole.labels, Database.open(saved, verify=True).labels)
    flip(saved / "rows-00001.safetensors")
    opened = Database.open(saved)
    assert len(opened) == 9
    for _ in range(2):
        with pytest.raises(gcfast.DamagedDatabaseError, match=r"rows-00001.* checksum differs"):
            _ = opened.embeddings
    for use in (lambda: opened.rows(0, 2), lambda: opened.save(saved.parent / "copy")):
        with pytest.raises(gcfast.DamagedDatabaseError, match="checksum differs"):
            use()
    model = common()
    with pytest.raises(gcfast.DamagedDatabaseError, match="checksum differs"):
        gcfast.load(saved, model, verify=True)
    with pytest.raises(gcfast.ModelMismatchError):
        gcfast.load(saved, model, verify=False)
    with pytest.raises(gcfast.DamagedDatabaseError, match="checksum differs"):
        Database.open(saved, verify=True)
    assert len(Database.open(saved, verify=False).embeddings) == 9


def test_a_database_outlasts_the_deletion_of_its_files(fresh: Database, saved: Path) -> None:
    opened = Database.open(saved, verify=False)
    for shard in saved.glob("rows-*"):
        shard.unlink()
    for field in FIELDS:
        assert torch.equal(getattr(opened, field), getattr(fresh, field))
    assert opened.rows(3, 5).labels.tolist() == fresh.labels[3:5].tolist()
    assert opened.ids == fresh.ids
    opened.save(saved.parent / "copy")
    assert torch.equal(Database.open(saved.parent / "copy").weights, fresh.weights)


def test_checksums_are_of_what_was_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "VERIFY_BYTES", 1000)
    flip(saved / "rows-00001.safetensors")
    opened = Database.open(saved)
    for shard in saved.glob("rows-*"):
        shard.unlink()
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"rows-00001.* checksum differs"):
        _ = opened.shards


def test_comparing_checksums_keeps_no_page_in_memory(tmp_path: Path) -> None:
    tensor = torch.zeros(2**24, dtype=torch.uint8)
    entry = write_tensors(tmp_path, "x", {"x": tensor})
    file = shards_module.MappedFile(tmp_path, entry, {"x": ("U8",)})
    before = resident()
    file.verify()
    assert resident() - before < 2**22
    file.path.unlink()
    file.verify()  # only once
    assert not file.columns["x"].any()
    assert resident() - before > 2**23


def test_tensors_are_views_of_the_mapping(saved: Path) -> None:
    opened = Database.open(saved, verify=False)
    inside = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(saved / "rows-00001.safetensors")):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            inside += [field for field, tensor in zip(FIELDS, opened.shards[1], strict=True)
                       if start <= tensor.data_ptr() < end]  # fmt: skip
    assert sorted(inside) == sorted(FIELDS)


def test_writing_to_a_tensor_leaves_the_file_as_it_is(saved: Path) -> None:
    before = (saved / "rows-00000.safetensors").read_bytes()
    opened = Database.open(saved)
    opened.shards[0].weights.zero_()
    assert not opened.shards[0].weights.any()
    assert (saved / "rows-00000.safetensors").read_bytes() == before
    assert Database.open(saved, verify=True).shards[0].weights.any()


def test_a_database_outlasts_its_replacement(fresh: Database, saved: Path) -> None:
    opened = Database.open(saved, verify=False)
    new = gcfast.Explainer(common(), "backbone", channels=5).build(loader(*pictures(9)))
    new.save(saved, overwrite=True)
    for field in FIELDS:
        assert torch.equal(getattr(opened, field), getattr(fresh, field))
    assert not torch.equal(opened.embeddings, Database.open(saved).embeddings)


def test_a_shard_that_goes_as_it_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is replaced is read again where that is said to be damage."""
    look = shards_module.MappedFile._check_size

    def late(file: shards_module.MappedFile) -> None:
        look(file)
        if file.path.name == "rows-00001.safetensors":
            file.path.unlink()

    monkeypatch.setattr(shards_module.MappedFile, "_check_size", late)
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"rows-00001.* cannot be read: .*o such"):
        Database.open(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("embeddings", torch.zeros(4, 6, dtype=torch.float64), "'embeddings' must be F32 or F16"),
        ("channels", torch.zeros(4, 5), "'channels' must be I64, got F32"),
        ("offsets", None, "it lacks 'offsets'"),
        ("labels", torch.zeros(3, dtype=torch.int64), r"must hold 4 rows, got \[3, 4\]"),
        ("offsets", torch.tensor(0.0), r"must hold 4 rows, got \[1, 4\]"),
    ],
)
def test_a_shard_of_other_tensors(
    saved: Path, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    path = saved / "rows-00000.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    path.write_bytes(safetensors.torch.save(tensors))
    entries = json.loads((saved / "manifest.json").read_text())["shards"]
    entries[0]["bytes"] = path.stat().st_size
    edit(saved, shards=entries)
    with pytest.raises(gcfast.DamagedDatabaseError, match=words):
        Database.open(saved, verify=False)


def test_the_first_format_still_opens(fresh: Database, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["storage"]
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    opened = Database.open(saved)
    assert (opened.storage, opened.weight_scale) == ("float32", 1)
    assert torch.equal(opened.weights, fresh.weights)


# --- several readers


def test_threads_and_processes_read_one_database(fresh: Database, saved: Path) -> None:
    opened = Database.open(saved)

    def read(_: int) -> bool:
        same = all(torch.equal(getattr(opened, f), getattr(fresh, f)) for f in FIELDS)
        return same and opened.ids == fresh.ids

    def read_all() -> None:
        assert read(0)
        assert Database.open(saved).ids == fresh.ids

    children = [forked(read_all) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(16)))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


# --- float16


def test_half_of_the_bytes(fresh: Database, saved: Path, tmp_path: Path) -> None:
    fresh.save(tmp_path / "half", storage="float16")
    assert fresh.path == saved
    assert fresh.storage == "float32"
    half = Database.open(tmp_path / "half")
    assert half.storage == "float16"
    for shard in half.shards:
        assert shard.embeddings.dtype == shard.weights.dtype == torch.float16
        # What a consumer that scales nothing sees: weights and offsets in one scale.
        torch.testing.assert_close(
            shard.offsets, (shard.weights.float() * half.mean_activation[shard.channels]).sum(1)
        )
    torch.testing.assert_close(half.weights, fresh.weights, rtol=1e-3, atol=0)
    torch.testing.assert_close(half.embeddings.float(), fresh.embeddings, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        half.offsets, (half.weights * half.mean_activation[half.channels]).sum(1)
    )
    assert torch.equal(half.channels, fresh.channels)
    half.save(tmp_path / "copy")
    copied = Database.open(tmp_path / "copy")
    assert torch.equal(copied.weights, half.weights)
    half.save(tmp_path / "again", storage="float32")
    again = Database.open(tmp_path / "again")
    assert (again.storage, again.weight_scale) == ("float32", 1)
    torch.testing.assert_close(again.weights, half.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(again.offsets, half.offsets)


@pytest.mark.parametrize("index", ["exact", "Flat"])
@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("normalize", ["max", None])
def test_maps_from_half(tmp_path: Path, center: float, normalize: str | None, index: str) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    one, database = built(k=3)
    database.save(tmp_path / "half", storage="float16")
    loaded = gcfast.load(tmp_path / "half", one.network.model, k=3, index=index)
    images, labels = pictures(4)
    options = {"center": center, "normalize": normalize}
    wanted = one.explain_batch(images, details=True, **options)
    got = loaded.explain_batch(images, details=True, **options)
    assert torch.equal(got.neighbors, wanted.neighbors)
    scale = float(wanted.maps.max())
    torch.testing.assert_close(got.maps, wanted.maps, rtol=0, atol=5e-3 * scale)
    torch.testing.assert_close(
        loaded.explain_labelled(images, labels, **options),
        one.explain_labelled(images, labels, **options),
        rtol=0, atol=2e-2 * scale,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "factor", "why"),
    [
        ("weights", 1e30, r"it has a weight of -?\d\.\d+e\+\d+, above the \S+ that the scale"),
        ("weights", float("nan"), r"it has a weight of nan, above the"),
        ("weights", 1e-12, r"its largest weight is -?\d\.\d+e-1\d, so small that in the scale"),
        ("embeddings", 1e30, r"its embedding has a value of -?\d\.\d+e\+\d+, above 65504$"),
    ],
)
def test_what_half_cannot_hold_is_refused(
    fresh: Database, tmp_path: Path, field: str, factor: float, why: str
) -> None:
    getattr(fresh, field)[6] *= factor
    words = r"`storage` must be 'float32' for .* cannot hold row 6: " + why
    with pytest.raises(ValueError, match=words):
        fresh.save(tmp_path / "half", storage="float16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="`storage` must be one of 'float32', 'float16', got 'f8'"):
        fresh.save(tmp_path / "half", storage="f8")
