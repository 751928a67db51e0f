"""`gcfast build --embeddings`."""

import csv

import faiss
import numpy as np
import pytest
import torch
from cli_case import SETTINGS, VIEW, fails, run

import gcfast


@pytest.fixture
def given(here, capsys, tmp_path):
    """A folder with the embeddings and the labels of a database that was built from pictures."""
    built = tmp_path / "built"
    assert run(capsys, "build", "--images", "pictures", "--out", built, *SETTINGS, *VIEW)[0] == 0
    assert here
    database = gcfast.Database.open(built)
    np.save(tmp_path / "vectors.npy", database.embeddings.numpy())
    names = [database.label_name(label) for label in database.labels.tolist()]
    write(tmp_path / "labels.csv", database, names)
    (tmp_path / "paths.txt").write_text("\n".join(database.ids))
    return tmp_path


def write(file, database, names, numbers=None):
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["path", "label"] if numbers is None else ["path", "label", "id"])
        rows = zip(database.ids, names, *([] if numbers is None else [numbers]), strict=True)
        writer.writerows(rows)


def build(capsys, given, *arguments):
    out = given / "db"
    base = ("build", "--images", "pictures", "--out", out, *SETTINGS, *VIEW)
    status, said, told = run(capsys, *base, *arguments)
    assert status == 0, told
    assert "pictures compared with their rows: 18, lowest cosine 1.0000" in told
    return gcfast.Database.open(out), said


def test_an_array_gives_the_database_of_the_pictures(given, capsys, tmp_path):
    database, said = build(
        capsys, given, "--embeddings", given / "vectors.npy", "--labels", given / "labels.csv"
    )
    wanted = gcfast.Database.open(given / "built")
    assert said == f"{given / 'db'}: 18 rows, 3 classes, layer features\n"
    assert torch.equal(database.channels, wanted.channels)
    assert list(database.ids) == list(wanted.ids)
    assert database.relative
    status, _, told = run(
        capsys, "explain", "--database", given / "db", *SETTINGS, "--out", tmp_path / "out",
        "pictures/red",
    )  # fmt: skip
    assert status == 0, told


def test_without_labels(given, capsys):
    database, said = build(
        capsys, given, "--embeddings", given / "vectors.npy", "--labels", "kmeans:2",
        "--paths", given / "paths.txt",
    )  # fmt: skip
    assert database.made_labels == "kmeans:2"
    assert "18 rows, without labels (kmeans:2), layer" in said


def test_an_index_with_ids_of_its_own(given, capsys):
    wanted = gcfast.Database.open(given / "built")
    index = faiss.IndexIDMap(faiss.IndexFlatIP(wanted.dim))
    numbers = 100 - np.arange(len(wanted))
    index.add_with_ids(wanted.embeddings.numpy(), numbers)
    faiss.write_index(index, str(given / "vectors.index"))
    names = [wanted.label_name(label) for label in wanted.labels.tolist()]
    write(given / "labels.csv", wanted, names, numbers.tolist())
    database, _ = build(
        capsys, given, "--embeddings", given / "vectors.index", "--labels", given / "labels.csv"
    )
    assert list(database.ids) == list(wanted.ids)[::-1]
    assert torch.equal(database.embeddings, wanted.embeddings.flip(0))
    for last, words in ((100, "one line for each id, "), ("8.5", "whole numbers as id, line 19")):
        write(given / "labels.csv", wanted, names, [*numbers.tolist()[:-1], last])
        arguments = ("--labels", given / "labels.csv")
        assert words in refused(capsys, given / "vectors.index", *arguments)


def test_a_parquet_file_has_everything(given, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    wanted = gcfast.Database.open(given / "built")
    table = pa.table(
        {
            "embedding": list(wanted.embeddings.numpy()),
            "label": [wanted.label_name(label) for label in wanted.labels.tolist()],
            "path": list(wanted.ids),
        }
    )
    parquet.write_table(table, given / "vectors.parquet")
    database, _ = build(capsys, given, "--embeddings", given / "vectors.parquet")
    assert torch.equal(database.channels, wanted.channels)
    rows = wanted.embeddings.tolist()
    rows[0], rows[1] = rows[0] + rows[1][:1], rows[1][1:]  # as many numbers in all
    parquet.write_table(table.set_column(0, "embedding", [rows]), given / "vectors.parquet")
    assert "as many numbers in every row" in refused(capsys, given / "vectors.parquet")
    parquet.write_table(table.drop_columns("embedding"), given / "vectors.parquet")
    assert "must have the column embedding" in refused(capsys, given / "vectors.parquet")


def refused(capsys, file, *arguments):
    base = ("build", "--images", "pictures", "--out", "never", *SETTINGS, *VIEW)
    return fails(capsys, *base, "--embeddings", file, *arguments)


def test_what_is_wrong_is_said(given, capsys, tmp_path):
    vectors, labels = given / "vectors.npy", ("--labels", given / "labels.csv")
    assert "`--labels` must be given with vectors.npy" in refused(capsys, vectors)
    words = refused(capsys, vectors, "--labels", "neighbors")
    assert "`--paths` must be given with vectors.npy" in words
    assert "must be a file .npy, .parquet" in refused(capsys, given / "vectors.txt", *labels)
    assert "--resume` must be left out" in refused(capsys, vectors, *labels, "--resume")
    np.save(given / "others.npy", np.random.default_rng(0).normal(size=(18, 6)).astype("f"))
    words = refused(capsys, given / "others.npy", *labels)
    assert "`--embeddings` must be what the model gives for the images of" in words
    (given / "paths.txt").write_text("\n".join(f"no/{i}.png" for i in range(18)))
    words = refused(capsys, vectors, "--labels", "neighbors", "--paths", given / "paths.txt")
    assert "at least 2 of the 18 that are named" in words
    (given / "labels.csv").write_text("path,class\na,b\n")
    assert "must have the columns path, label" in refused(capsys, vectors, *labels)
    (given / "bad.index").write_bytes(b"nothing")
    assert "cannot be read as one" in refused(capsys, given / "bad.index", *labels)
    base = ("build", "--images", "pictures", "--out", tmp_path / "x", *SETTINGS, *VIEW)
    assert "`--norms` must be left out" in fails(capsys, *base, "--norms", vectors)
    assert "must be a CSV without --embeddings" in fails(capsys, *base, "--labels", "kmeans:3")
