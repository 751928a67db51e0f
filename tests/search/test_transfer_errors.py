"""What the transfer engine says when something is wrong, and that it ends cleanly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import common, loader, pictures
from transfer_case import KEPT, WIDTH, Scripted, engine, queries, table

import gcfast
from gcfast import _core

pytest.importorskip("faiss")

# --- what the index does


def test_an_index_that_raises_is_heard() -> None:
    whole = table(10)

    def answer(part: torch.Tensor, k: int) -> Any:
        if len(part) == 3:
            raise LookupError(f"three queries, {k} neighbours")
        return np.zeros((len(part), k))

    made = engine(Scripted(10, answer), [whole])
    for _ in range(2):
        with pytest.raises(LookupError, match="three queries, 2 neighbours") as caught:
            made.transfer(queries(3), k=2)
    assert "search_c" in [entry.name for entry in caught.traceback]  # where it came from
    assert (made.transfer(queries(2), k=2)[0] == 0).all()  # and it goes on working


def test_faisss_own_exceptions_keep_their_type_and_text() -> None:
    import faiss

    whole = table(200)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, 4)
    index.train(whole.embeddings.numpy())
    index.add(whole.embeddings.numpy())
    made = engine(index, [whole])
    index.nprobe = 0
    with pytest.raises(RuntimeError, match="nprobe"):
        made.transfer(queries(3), k=1)


@pytest.mark.parametrize("wrong", [10, -2])
def test_an_id_that_is_no_row_is_refused(wrong: int) -> None:
    made = engine(Scripted(10, lambda *_: [[3, wrong]]), [table(10)])
    with pytest.raises(
        ValueError, match=f"must number the database's rows, 0 to 9, it returned {wrong}"
    ):
        made.transfer(queries(1), k=2)


def test_nan_queries_do_no_harm() -> None:
    whole = table(10)
    made = engine(Scripted(10, lambda *_: [[3, 1, -1, 2]]), [whole])
    got = made.transfer(np.full((1, WIDTH), np.nan, np.float32), k=4)
    assert got[0].tolist() == [[1, 2, 3, -1]]
    assert np.isnan(got[1][0, :3]).all()


# --- what the engine is given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"memory_bytes": 0}, "`memory_bytes` must be at least 1"),
        ({"dim": WIDTH + 1}, "`embeddings` of a shard has another shape"),
        ({"width": KEPT + 1}, "`channels` of a shard has another shape"),
        ({"dim": 0}, "`dim` must be at least 1 and `width` at least 0"),
        ({"index": Scripted(9, lambda *_: 0)}, "must hold the database's 10 rows, got 9"),
        ({"labels": np.zeros(10, np.int32)}, "`labels` of a shard has another dtype"),
        ({"weights": np.zeros((10, KEPT))}, "`weights` of a shard has another dtype"),
        ({"weights": np.zeros((10, KEPT), np.int16)}, "`weights` of a shard has another dtype"),
        ({"offsets": np.zeros(20, np.float32)[::2]}, "`offsets` of a shard .* not contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_compiled_engine_refuses(change: dict[str, Any], words: str) -> None:
    names = ("embeddings", "channels", "weights", "offsets", "labels")
    arrays = {n: t.numpy() for n, t in zip(names, table(10)[:5], strict=True)}
    arguments = {
        "index": Scripted(10, lambda *_: 0),
        "dim": WIDTH,
        "width": KEPT,
        "threads": 1,
        "memory_bytes": 1,
    }
    for name, value in change.items():
        (arrays if name in arrays else arguments)[name] = value
    index = arguments.pop("index")
    with pytest.raises(ValueError, match=words):
        _core.TransferEngine(index, [tuple(arrays.values())], **arguments)


def test_what_a_call_refuses() -> None:
    made = engine(Scripted(10, lambda *_: 0), [table(10)])
    with pytest.raises(ValueError, match=rf"`queries` must have shape \[B, D\] with D = {WIDTH}"):
        made.transfer(np.zeros((3, WIDTH + 1), np.float32), k=1)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        made.transfer(queries(3), k=0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        made.transfer(np.zeros((3, WIDTH)), k=1)


# --- what becomes of the files


def saved(folder: Path, index: str) -> tuple[gcfast.Explainer, Path]:
    """An explainer over a memory-mapped database, which it has used, and its one shard."""
    model = common()
    gcfast.Explainer(model, "backbone", channels=5).build(loader(*pictures(60))).save(folder)
    one = gcfast.Explainer(model, database=gcfast.Database.open(folder), index=index)
    one.explain_batch(pictures(2)[0])
    return one, folder / "rows-00000.safetensors"


INDICES = pytest.mark.parametrize("index", ["exact", "Flat"])


@INDICES
def test_a_database_whose_file_is_deleted_lives_on_in_its_readers(
    tmp_path: Path, index: str
) -> None:
    one, file = saved(tmp_path / "rows", index)
    images, _ = pictures(2)
    before = one.explain_batch(images)
    file.unlink()
    assert torch.equal(one.explain_batch(images), before)


@INDICES
def test_a_database_that_is_replaced_lives_on_in_its_readers(tmp_path: Path, index: str) -> None:
    one, _ = saved(tmp_path / "rows", index)
    images, _ = pictures(2)
    before = one.explain_batch(images)
    shorter = gcfast.Explainer(common(), "backbone", channels=5).build(loader(*pictures(6)))
    shorter.save(tmp_path / "rows", overwrite=True)
    assert torch.equal(one.explain_batch(images), before)


def test_a_database_in_memory_does_not_need_its_folder(tmp_path: Path) -> None:
    one = gcfast.Explainer(common(), "backbone", channels=5, index="Flat")
    one.build(loader(*pictures(60))).save(tmp_path / "rows")
    (tmp_path / "rows" / "rows-00000.safetensors").unlink()
    one.explain_batch(pictures(2)[0])
