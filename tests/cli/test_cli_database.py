"""The commands on a database that is there: compress, index, info."""

from __future__ import annotations

import pytest
from cli_case import SETTINGS, fails, run

from gcfast.database.database import Database

pytest.importorskip("faiss")


@pytest.mark.usefixtures("here")
def test_compress(capsys, tmp_path):
    small = tmp_path / "small"
    status, out, err = run(capsys, "compress", "db", "--centers", "3", "--out", small)
    assert (status, err) == (0, "")
    assert out.startswith(f"{small}: 18 rows in ")
    assert " became 3 centers in " in out
    database = Database.open(small)
    assert len(database) == 3
    members = [name for row in range(3) for name in database.members_of(row)]
    assert sorted(members) == sorted(Database.open("db").ids)
    assert "; --force replaces it" in fails(
        capsys, "compress", "db", "--centers", "3", "--out", small
    )
    assert run(capsys, "compress", "db", "--centers", "2", "--out", small, "--seed", "4",
               "--iterations", "7",
               "--storage", "float16", "--force")[0] == 0  # fmt: skip
    again = Database.open(small)
    assert (len(again), again.storage) == (2, "float16")
    facts = again.manifest["compressed"]
    assert (facts["seed"], facts["iterations"]) == (4, 7)
    assert "`--centers` must be from 1 to 18, got 19" in fails(
        capsys, "compress", "db", "--centers", "19", "--out", tmp_path / "none"
    )
    assert "there is no database at nowhere" in fails(
        capsys, "compress", "nowhere", "--out", tmp_path / "none"
    )
    status, out, _ = run(capsys, "info", small)
    assert "compressed.rows              18\n" in out
    # Its rows explain, and the page finds the picture of each centre.
    assert run(capsys, "explain", "pictures/green", "--database", small, "--out", tmp_path / "page",
               *SETTINGS)[0] == 0  # fmt: skip
    assert (tmp_path / "page" / "index.html").exists()


def test_index(capsys, tmp_path, here):
    status, out, err = run(capsys, "index", "db", "--factory", "HNSW8")
    assert (status, err) == (0, "")
    (file,) = (here / "db").glob("index-*.faiss")
    size = file.stat().st_size
    assert out == f"{file}: HNSW8 of 18 rows, {size:,} bytes\n"
    assert run(capsys, "explain", "pictures/green", "--database", "db", "--out", tmp_path / "page",
               "--index", "stored", *SETTINGS)[0] == 0  # fmt: skip
    assert "`--factory` must be a FAISS factory string, got 'Hnws'" in fails(
        capsys, "index", "db", "--factory", "Hnws"
    )


def test_info_compares_checksums_when_asked(capsys, tmp_path, here):
    Database.open("db").save(tmp_path / "db")
    shard = tmp_path / "db" / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(capsys, "info", tmp_path / "db")[0] == 0
    assert "checksum differs" in fails(capsys, "info", tmp_path / "db", "--verify")
    assert run(capsys, "info", here / "db", "--verify")[0] == 0


@pytest.mark.usefixtures("here")
def test_remove_relabel_and_merge(capsys, tmp_path):
    """On copies: the pictures' ids are their paths."""
    for name in ("one", "two"):
        Database.open("db").save(tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(capsys, "index", one, "--factory", "Flat")[0] == 0
    (tmp_path / "gone.txt").write_text("green/1.png\n\nblue/0.png\n")
    status, out, err = run(capsys, "remove", one, "red/0.png", "--ids-from", tmp_path / "gone.txt")
    assert (status, out) == (0, f"{one}: 3 rows removed, 15 stay\n")
    assert err.startswith("gcfast: the stored index of the database held for the rows before and")
    left = Database.open(one, verify=True)
    assert set(Database.open("db").ids) - set(left.ids) == {
        "red/0.png",
        "green/1.png",
        "blue/0.png",
    }
    assert "has none of red/0.png" in fails(capsys, "remove", one, "red/0.png")
    assert "must name at least one row" in fails(capsys, "remove", one)

    table = tmp_path / "new.csv"
    table.write_text("path,label\nred/1.png,green\nred/2.png,violet\n")
    assert run(capsys, "relabel", one, "--labels", table) == (
        0, f"{one}: 2 rows relabelled, 1 new classes\n", ""
    )  # fmt: skip
    now = Database.open(one, verify=True)
    labels = {i: now.label_name(n) for i, n in zip(now.ids, now.labels.tolist(), strict=True)}
    assert (labels["red/1.png"], labels["red/2.png"], labels["red/3.png"]) == (
        "green", "violet", "red"
    )  # fmt: skip
    table.write_text("file,label\nred/1.png,green\n")
    assert "columns path and label" in fails(capsys, "relabel", one, "--labels", table)
    table.write_text("path,label\nred/1.png,green\nred/1.png,red\n")
    assert "each picture once, got red/1.png" in fails(capsys, "relabel", one, "--labels", table)

    both = tmp_path / "both"
    assert "for more than one row" in fails(capsys, "merge", one, two, "--out", both)
    status, out, _ = run(capsys, "merge", one, two, "--out", both, "--prefixes", "a/", "b/")
    assert (status, out) == (0, f"{both}: 15 + 18 = 33 rows\n")
    assert {name[:2] for name in Database.open(both, verify=True).ids} == {"a/", "b/"}
    assert "; --force replaces it" in fails(capsys, "merge", one, two, "--out", both)
    assert (
        run(capsys, "merge", one, two, "--out", both, "--prefixes", "a/", "b/", "--force")[0] == 0
    )
    status, out, _ = run(capsys, "info", one)
    assert "report.removed               3\n" in out
    assert "report.zero_rows " in out
