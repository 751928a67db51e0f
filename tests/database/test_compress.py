"""The compressed database against a plain loop, and what it keeps of its rows."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clustered
from loops import dense
from networks import common, loader, pictures
from test_database import edit

import gcfast
from gcfast.database import compress as compress_module
from gcfast.database import shards
from gcfast.database.database import Database
from gcfast.database.ids import IdTable
from gcfast.database.manifest import FORMAT_VERSION
from gcfast.database.members import Members, PackedMembers, packed, unpacked
from gcfast.database.shards import FIELDS
from gcfast.database.write import MEMBERS, write_tensors

pytest.importorskip("faiss")
N, C, M, DIM = 300, 20, 4, 6


def made(storage: str = "float32") -> Database:
    """Rows in five clusters with labels that mix, weights of both signs."""
    embeddings, groups = clustered(N, DIM, 5, spread=0.1)
    channels = torch.rand(N, C).argsort(1)[:, :M]
    weights = torch.randn(N, M).sort(1, descending=True).values * 1e-3
    mean = torch.rand(C)
    tensors = {
        "embeddings": embeddings,
        "channels": channels,
        "weights": weights,
        "offsets": (weights * mean[channels]).sum(1),
        "labels": (groups + (torch.rand(N) < 0.4).long()) * 7,
        "triplet_counts": torch.randint(9, (N,)),
    }
    built = gcfast.Explainer(common(), "backbone", channels=5).build(loader(*pictures(9)))
    manifest = built.manifest | {"mean_activation": mean.double().tolist()}
    database = Database(tensors, [f"id {i} ü" for i in range(N)], manifest)
    return database.in_storage(storage)


@pytest.fixture
def in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(shards, "SHARD_ROWS", 70)
    monkeypatch.setattr(compress_module, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(compress_module, "CENTERS_AT_ONCE", 5)
    made().save(tmp_path / "whole")
    return Database.open(tmp_path / "whole")


def check(small: Database, whole: Database) -> None:
    """Everything but the centers' places, by a loop over centers and rows."""
    f, full = whole.embeddings.double(), dense(whole, C).double()
    distances = (f[:, None] - small.embeddings.double()).square().sum(-1)
    nearest = distances.argmin(1)
    mean = torch.tensor(whole.manifest["mean_activation"], dtype=torch.float64)
    for center in range(len(small)):
        rows = [row for row in range(len(whole)) if nearest[row] == center]
        assert rows
        assert small.manifest["compressed"]["counts"][center] == len(rows)
        assert small.members_of(center) == [whole.ids[row] for row in rows]
        assert small.ids[center] == whole.ids[min(rows, key=lambda row: distances[row, center])]
        average = sum(full[row] for row in rows) / len(rows)
        kept = sorted(range(C), key=lambda c: (-float(average[c].float()), c))[:M]
        assert small.channels[center].tolist() == kept
        torch.testing.assert_close(small.weights[center], average[kept].float())
        torch.testing.assert_close(
            small.offsets[center], (average[kept] * mean[kept]).sum().float(), rtol=1e-5, atol=1e-9
        )
        votes: dict[int, int] = {}
        for row in rows:
            label = int(whole.labels[row])
            votes[label] = votes.get(label, 0) + 1
        assert small.labels[center] == min(votes, key=lambda label: (-votes[label], label))
        assert small.triplet_counts[center] == sum(int(whole.triplet_counts[row]) for row in rows)


@pytest.mark.parametrize("centers", [1, 3, 13, N])
def test_it_equals_the_loop(in_shards: Database, centers: int) -> None:
    small = in_shards.compress(centers)
    assert len(small) <= centers
    check(small, in_shards)
    again = in_shards.compress(centers)
    for field in FIELDS:
        assert torch.equal(getattr(small, field), getattr(again, field))
    if centers == 13:
        other = in_shards.compress(centers, seed=1)
        assert not torch.equal(other.embeddings, small.embeddings)


def test_centers_are_the_clusters_means_and_not_normalized(in_shards: Database) -> None:
    small = in_shards.compress(5)
    nearest = torch.cdist(in_shards.embeddings, small.embeddings).argmin(1)
    for center in range(5):
        mean = in_shards.embeddings[nearest == center].mean(0)
        torch.testing.assert_close(small.embeddings[center], mean, rtol=1e-3, atol=1e-3)
    assert (small.embeddings.norm(dim=1) < 0.9995).all()


def test_from_half(tmp_path: Path) -> None:
    whole = made("float16")
    assert whole.weight_scale > 1
    small = whole.compress(7)
    assert (small.storage, small.weight_scale) == ("float32", 1)
    check(small, whole)
    small.save(tmp_path / "half", storage="float16")
    half = Database.open(tmp_path / "half")
    assert half.members_of(3) == small.members_of(3)
    torch.testing.assert_close(half.weights, small.weights, rtol=1e-3, atol=1e-7)


def test_a_sample_stands_for_many_rows(in_shards: Database, monkeypatch: Any) -> None:
    monkeypatch.setattr(compress_module, "SAMPLE_EACH", 20)
    small = in_shards.compress(5)
    check(small, in_shards)
    assert sum(small.manifest["compressed"]["counts"]) == N


def test_there_and_back(in_shards: Database, tmp_path: Path) -> None:
    small = in_shards.compress(6, iterations=3)
    small.save(tmp_path / "small")
    opened = Database.open(tmp_path / "small")
    assert opened.manifest["compressed"] == {
        "rows": N,
        "centers": len(small),
        "seed": 0,
        "iterations": 3,
        "counts": small.manifest["compressed"]["counts"],
    }
    for field in FIELDS:
        assert torch.equal(getattr(opened, field), getattr(small, field))
    assert [opened.members_of(i) for i in range(6)] == [small.members_of(i) for i in range(6)]
    opened.save(tmp_path / "copy")
    assert Database.open(tmp_path / "copy").members_of(2) == small.members_of(2)
    in_shards.save(tmp_path / "small", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "small").iterdir())[0] == "manifest.json"
    assert not list((tmp_path / "small").glob("members*"))


def write_plain(members: Members, folder: Path) -> dict[str, Any]:
    """The members as format 2 had them; returns the manifest's entry."""
    ids = members.ids
    tensors = {"ends": members.ends, "id_ends": ids.ends, "id_bytes": ids.content}
    return write_tensors(folder, "members.safetensors", tensors)


def test_members_of_the_second_format_still_open(in_shards: Database, tmp_path: Path) -> None:
    small = in_shards.compress(6)
    small.save(tmp_path / "small")
    assert isinstance(small.members, Members)
    entry = write_plain(small.members, tmp_path / "small")
    edit(tmp_path / "small", members=entry, format_version=2)
    opened = Database.open(tmp_path / "small")
    opened.save(tmp_path / "anew")
    anew = Database.open(tmp_path / "anew")
    assert anew.manifest["format_version"] == FORMAT_VERSION
    for center in range(6):
        assert opened.members_of(center) == small.members_of(center)
        assert anew.members_of(center) == small.members_of(center)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        ["0"],
        ["0", "0", "7", "123456789012345678"],
        ["7", "3"],
        ["01", "2"],
        ["9" * 19],
        ["", "a\nb\0", "ü" * 300],
        ["\udcff.jpg", "²"],
        [f"class{i // 7}/{i}.jpg" for i in range(99)],
    ],
    ids=repr,
)
def test_ids_are_packed_and_come_back(ids: list[str]) -> None:
    block = packed(ids)
    assert unpacked(block, len(ids)) == ids
    for wrong in {len(ids) + 1, max(0, len(ids) - 1)} - {len(ids)}:
        with pytest.raises((ValueError, IndexError)):
            unpacked(block, wrong)


def test_packed_ids_are_small() -> None:
    """Against 14 bytes a row number with its end, and 31 a name."""
    rows = [str(i) for i in sorted(random.Random(0).sample(range(1_000_000), 20_000))]
    assert len(packed(rows)) <= 1.2 * len(rows)
    names = [f"class{int(i) // 600:04d}/image_{i}.jpg" for i in rows]
    assert len(packed(names)) <= 6 * len(names)


def test_a_block_that_is_no_ids_is_named() -> None:
    ends = torch.tensor([3])
    for block in (b"", b"\0nonsense", bytes([2]) + packed(["a", "b", "c"])[1:]):
        blocks = torch.tensor(list(block), dtype=torch.uint8)
        with pytest.raises(gcfast.DamagedDatabaseError, match="members of center 0 are damaged"):
            PackedMembers(ends, torch.tensor([len(block)]), blocks).of_center(0)


def test_it_explains(tmp_path: Path) -> None:
    one = gcfast.Explainer(common(), "backbone", channels=5)
    whole = one.build(loader(*pictures(30)))
    whole.compress(3).save(tmp_path / "small")
    small = gcfast.load(tmp_path / "small", one.network.model)
    images = pictures(4)[0]
    explained = small.explain_batch(images, details=True)
    distances = torch.cdist(explained.embeddings, small.database.embeddings).square()
    assert torch.equal(explained.neighbors[:, 0], distances.argmin(1))
    with pytest.raises(gcfast.GcfastError, match="a compressed database takes no further rows"):
        small.append(loader(*pictures(5)))
    with pytest.raises(ValueError, match="`database` must be a whole one, got one of centers"):
        small.database.compress(2)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made()
    with pytest.raises(ValueError, match="`centers` must be from 1 to 300, got 301"):
        whole.compress(301)
    with pytest.raises(ValueError, match="`centers` must be from 1 to 300, got 0"):
        whole.compress(0)
    with pytest.raises(TypeError, match=r"`centers` must be an int, got 5\.0"):
        whole.compress(5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`iterations` must be at least 1, got 0"):
        whole.compress(iterations=0)
    with pytest.raises(ValueError, match="`seed` must be from 0"):
        whole.compress(seed=-1)
    with pytest.raises(gcfast.GcfastError, match="not compressed has no members"):
        whole.members_of(0)
    small = whole.compress(3)
    with pytest.raises(ValueError, match="`row` must be from 0 to 2, got 3"):
        small.members_of(3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(gcfast.MissingExtraError, match=r"`compress` needs FAISS, .*gcfast\[cpu\]"):
        whole.compress(3)


@pytest.mark.parametrize("harm", ["deleted", "truncated", "edited", "shorter", "plain, shorter"])
def test_damaged_members(tmp_path: Path, harm: str) -> None:
    made().compress(3).save(tmp_path / "small")
    opened = Database.open(tmp_path / "small")
    (file,) = (tmp_path / "small").glob("members-*.safetensors")
    content = bytearray(file.read_bytes())
    words = {
        "deleted": "the members file .* is missing",
        "truncated": "truncated or changed",
        "edited": "is changed: its checksum differs",
        "shorter": "must hold the members of 1 centers",
        "plain, shorter": "must hold 300 members",
    }[harm]
    if harm == "deleted":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(content[:-5])
    elif harm == "edited":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "shorter":
        entry = PackedMembers(torch.tensor([300]), torch.tensor([4]), torch.zeros(5).byte())
        packed = write_tensors(file.parent, MEMBERS, entry._asdict()) | {"packed": True}
        edit(tmp_path / "small", members=packed)
    else:
        members = Members(torch.tensor([299]), IdTable.encoded(["x"] * 300))
        entry = write_plain(members, file.parent)
        edit(tmp_path / "small", members=entry)
    with pytest.raises(gcfast.DamagedDatabaseError, match=words):
        Database.open(tmp_path / "small").members_of(0)
    if harm == "deleted":  # what was open lives on
        assert sum(len(opened.members_of(row)) for row in range(len(opened))) == 300
