"""Builds that write as they go: as `save` writes, resumed where they stopped, or refused."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_builds import MOMENTS, POINTS
from networks import CHANNELS, DIM, Lambda, Net, Pool, common, loader, other, pictures
from torch import Tensor, nn

import gcfast
from gcfast.builder import resumable
from gcfast.database import shards, write
from gcfast.database.database import Database
from gcfast.database.shards import FIELDS
from gcfast.model.fingerprint import IMAGES

HEADS = {"closed form": common, "autograd": other}
BOTH = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commits and several shards from a few pictures."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    monkeypatch.setattr(resumable, "COMMIT_ROWS", 8)


def explainer(model: nn.Module, **settings: Any) -> gcfast.Explainer:
    settings.setdefault("channels", 5)
    settings.setdefault("triplets", 4)
    return gcfast.Explainer(model, settings.pop("layer", "backbone"), **settings)


def batches(count: int = 22, *, ids: bool = True) -> list[Any]:
    """Pictures in batches of 4 with labels that have names, one of them seen once."""
    images, labels = pictures(count)
    names = [("robin", "wren", "tit")[i] for i in labels]
    names[9] = "alone"
    given = loader(images, names, 4)
    if not ids:
        return given
    return [(x, y, [f"{n}/{i} ü" for i in range(len(y))]) for n, (x, y) in enumerate(given)]


class StopError(Exception):
    pass


def stopping(given: list[Any], after: int) -> Iterator[Any]:
    """A loader that fails behind so many batches; one that can be gone through twice."""

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            yield from given[:after]
            raise StopError

    return Loader()  # type: ignore[return-value]


def stopping_before(name: str) -> Any:
    """A renaming that fails where a file is to get this name."""
    rename = write.files.rename

    def renaming(staged: Path, path: Path) -> None:
        if path.name == name:
            raise ZeroDivisionError
        rename(staged, path)

    return renaming


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def unfinished(one: gcfast.Explainer, given: list[Any], folder: Path, after: int = 3) -> Path:
    """A build that stopped in stage 1."""
    with pytest.raises(StopError) as caught:
        one.build(stopping(given, after), out=folder)
    assert f"kept in {folder}: resume=True (--resume)" in caught.value.__notes__[0]
    assert not (folder / "manifest.json").exists()
    return folder


# --- the same folder as `save`


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@BOTH
def test_it_writes_what_save_writes(tmp_path: Path, make: Any, method: str, storage: str) -> None:
    one, given = explainer(make(), method=method), batches()
    kept = {"size": 8}
    one.build(given, preprocessing=kept, storage=storage).save(tmp_path / "saved")
    built = one.build(given, preprocessing=kept, storage=storage, out=tmp_path / "new" / "built")
    assert one.database is built
    assert built.path == tmp_path / "new" / "built"
    assert content(built.path) == content(tmp_path / "saved")
    assert len(content(built.path)) == 4
    assert [p.name for p in built.path.parent.iterdir()] == ["built"]
    assert built.report["skipped_single"] == 1
    assert built.storage == storage


def test_ids_and_labels_of_every_kind(tmp_path: Path) -> None:
    images, labels = pictures(8)
    for number, given in enumerate(
        [
            [(images, labels)],
            [(images, labels, ["", *"1234567"])],
            [(images, labels, ["\udcff" * (i + 1) for i in range(8)])],
            [(images, [-3 if i else 5 for i in labels])],
        ]
    ):
        one = explainer(common())
        built = one.build(iter(given), out=tmp_path / str(number))
        wanted = one.build(given)
        assert built.ids == wanted.ids
        assert torch.equal(built.labels, wanted.labels)
        assert torch.equal(built.weights, wanted.weights)


# --- killed and resumed


@pytest.mark.parametrize("head", [pytest.param("closed form", marks=pytest.mark.slow), "autograd"])
def test_killed_at_any_moment_it_resumes_to_the_same_rows(tmp_path: Path, head: str) -> None:
    here = Path(__file__).parents[1]
    command = [sys.executable, here / "kill_builds.py", tmp_path, head]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # its threads do not survive a fork
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == POINTS + MOMENTS
    assert all(kill["same"] and kill["clean"] for kill in kills)
    counted = [kill for kill in kills if isinstance(kill["point"], int)]
    assert all(kill["killed"][0] for kill in counted)
    # What has little left to do can end before the operation that the second kill waits for.
    assert all(kill["killed"][1] for kill in counted if kill["stage"] != "finishing")
    stages = {kill["stage"] for kill in kills}
    assert stages >= {"begun", "embedding", "rows, some"}
    # What was whole is not done again.
    late = [kill for kill in kills if kill["stage"] == "rows, some"]
    assert all(kill["operations_left"] < 0.6 * kill["of"] for kill in late)


@BOTH
def test_batches_that_are_done_are_not_embedded_again(tmp_path: Path, make: Any) -> None:
    given, model = batches(), make()
    wanted = explainer(model).build(given)
    folder = tmp_path / "db"
    unfinished(explainer(model), given, folder, after=5)
    passed: list[int] = []
    hook = model.register_forward_hook(lambda _, x, __: passed.append(len(x[0])))
    # The layer is not named this time: it is the unfinished build's.
    database = explainer(model, layer=None).build(given, out=folder, resume=True)
    hook.remove()
    # Committed were 16 of 22 images: the last of those batches is compared, the rest embedded.
    again = [4, 4, 2]
    # The fixed images of the fingerprint come last.
    passes = again if make is common else [*again, 4, 4, 4, 4, 4, 2]
    assert passed == [*passes, IMAGES]
    for field in FIELDS:
        assert torch.equal(getattr(database, field), getattr(wanted, field)), field
    assert database.ids == wanted.ids
    assert database.manifest["channels_last"] == wanted.manifest["channels_last"]


def test_rows_in_closed_form_are_resumed_without_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, given = explainer(common()), batches()
    wanted = one.build(given)
    write, written = resumable.write_shard, []

    def failing(*args: Any) -> Any:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(args)
        return write(*args)

    monkeypatch.setattr(resumable, "write_shard", failing)
    with pytest.raises(OSError, match=r"cannot write the database .*db: No space left"):
        one.build(given, out=tmp_path / "db")
    monkeypatch.setattr(resumable, "write_shard", write)
    database = one.build([], out=tmp_path / "db", resume=True)
    assert torch.equal(database.weights, wanted.weights)
    assert database.report == wanted.report


def test_a_head_that_bends_after_a_commit(tmp_path: Path) -> None:
    model = Net(nn.Sequential(Pool(), nn.Linear(CHANNELS, DIM)))
    bent = model.head[1]

    def clamp(x: Tensor) -> Tensor:  # affine until an image is brighter than the probe's ever were
        return torch.where(x.abs().amax(1, keepdim=True) > 1e3, x.clamp(-700, 900), x)

    model.head = nn.Sequential(Pool(), bent, Lambda(clamp))
    given = batches()
    given[2][0][1] *= 1e6
    one = explainer(model, l2_normalize=False, objective=gcfast.DistanceDifference())
    wanted = one.build(given)
    assert not wanted.manifest["closed_form"]
    for after in (3, 5):  # 8 and 16 images are committed
        folder = tmp_path / str(after)
        partial = unfinished(one, given, folder, after)
        assert json.loads((partial / "build.json").read_text())["head"] is (after == 3)
        database = one.build(given, out=folder, resume=True)
        assert torch.equal(database.weights, wanted.weights)


def test_slow_images_are_committed_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "COMMIT_ROWS", 10**9)
    monkeypatch.setattr(resumable, "COMMIT_SECONDS", 0.0)
    partial = unfinished(explainer(common()), batches(), tmp_path / "db", after=2)
    assert json.loads((partial / "build.json").read_text())["totals"]["rows"] == 8


def test_resume_with_nothing_to_resume_begins(tmp_path: Path) -> None:
    one, given = explainer(common()), batches()
    one.build(given, out=tmp_path / "db", resume=True)
    with pytest.raises(FileExistsError, match=r"got the database .*; overwrite=True replaces it"):
        one.build(given, out=tmp_path / "db", resume=True)


# --- what is there already


def test_an_unfinished_build_is_never_overwritten(tmp_path: Path) -> None:
    one, given = explainer(common()), batches()
    partial = unfinished(one, given, tmp_path / "db")
    before = content(partial)
    with pytest.raises(FileExistsError, match=r"`path` must not be an unfinished build, got"):
        one.build(given).save(partial, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(
            FileExistsError, match=r"must not be an unfinished build, .*; resume=True continues it"
        ):
            one.build(given, out=tmp_path / "db", overwrite=overwrite)
    assert content(partial) == before
    with pytest.raises(gcfast.NoDatabaseError, match=r"an unfinished build is in .*db,"):
        Database.open(tmp_path / "db")


def test_an_old_database_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    one, folder = explainer(common()), tmp_path / "db"
    old = one.build(batches(12), out=folder)
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        one.build(batches(), out=folder)
    with pytest.raises(StopError):
        one.build(stopping(batches(), 4), out=folder, overwrite=True)
    assert len(Database.open(folder)) == len(old) == 11
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        one.build(batches(), out=folder, resume=True)
    given = batches()
    (folder / "build.json").unlink()  # to start over, as the error said
    new = one.build(given, out=folder, overwrite=True)
    assert len(new) == len(Database.open(folder)) == 21
    assert [p.name for p in tmp_path.iterdir()] == ["db"]
    assert len(content(folder)) == 4


def test_nothing_else_is_written_to_the_folder_meanwhile(tmp_path: Path) -> None:
    one, given, folder = explainer(common()), batches(), tmp_path / "db"
    saved = one.build(batches(12))

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            yield from given
            with pytest.raises(FileExistsError, match="must not be an unfinished build"):
                saved.save(folder)

    assert len(one.build(Loader(), out=folder)) == 21
    reader = Database.open(folder)

    class Again:
        def __iter__(self) -> Iterator[Any]:
            for call in (
                lambda: saved.save(folder, overwrite=True),
                lambda: reader.build_index("Flat"),
                lambda: gcfast.load(folder, one.network.model).append(given),
            ):
                with pytest.raises(gcfast.GcfastError, match="another process is building in"):
                    call()
            assert len(Database.open(folder, verify=True)) == 21
            yield from batches(12)

    assert len(one.build(Again(), out=folder, overwrite=True)) == 11
    assert [p.name for p in tmp_path.iterdir()] == ["db"]


def test_what_is_no_unfinished_build_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"got .*db, not a gcfast database"):
            explainer(common()).build(batches(), out=folder, resume=resume)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    unfinished(explainer(common()), batches(), tmp_path / "other")
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"got .*other, not a gcfast database"):
        explainer(common()).build(batches(), out=tmp_path / "other", resume=True)


def test_a_build_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`channels` must be at most") as caught:
        explainer(common(), channels=50).build(batches(), out=tmp_path / "db")
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(ValueError, match="got none"):
        explainer(common()).build([], out=tmp_path / "db")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_build_in_one_folder(tmp_path: Path) -> None:
    one, given, folder = explainer(common()), batches(), tmp_path / "db"

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            yield from given[:3]
            with pytest.raises(gcfast.GcfastError, match="another process is building"):
                one.build(given, out=folder, resume=True)
            yield from given[3:]

    assert len(one.build(Loader(), out=folder)) == 21


@pytest.mark.parametrize("argument", ["resume", "overwrite"])
def test_arguments_that_need_a_folder(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be False without `out`, got True"):
        explainer(common()).build(batches(), **{argument: True})


def test_storage_is_checked_before_the_work() -> None:
    with pytest.raises(ValueError, match="`storage` must be one of 'float32', 'float16', got 'x'"):
        explainer(common()).build(iter([]), storage="x")


# --- resumed with something else


def test_other_settings_are_refused(tmp_path: Path) -> None:
    model, given = common(), batches()
    partial = unfinished(explainer(model), given, tmp_path / "db")
    before = content(partial)

    def refused(error: type[Exception], words: str, one: gcfast.Explainer, **more: Any) -> None:
        with pytest.raises(error, match=words):
            one.build(given, out=tmp_path / "db", resume=True, **more)
        assert content(partial) == before

    said = r"`resume` must have the settings that .*db was begun with: "
    refused(ValueError, said + "triplets was 4, is 5; seed was 0, is 1",
            explainer(model, triplets=5, seed=1))  # fmt: skip
    refused(ValueError, said + r"preprocessing was None, is \{'size': 3\}", explainer(model),
            preprocessing={"size": 3})  # fmt: skip
    refused(ValueError, said + "layer was 'backbone', is 'backbone.stem'",
            explainer(model, layer="backbone.stem"))  # fmt: skip
    refused(gcfast.ModelMismatchError, "unfinished build .* another model .*: other parameters",
            explainer(common()))  # fmt: skip
    state = json.loads((partial / "build.json").read_text())
    assert state.pop("draws") == 2
    (partial / "build.json").write_text(json.dumps(state))
    before = content(partial)
    refused(ValueError, said + "triplets of the stored rows were drawn by the rules of version 1",
            explainer(model))  # fmt: skip


# --- another storage


def uneven(head: str) -> tuple[gcfast.Explainer, list[Any]]:
    """Rows of one scale but for the 17th, a picture so dark that its weights are huge."""
    model = HEADS[head]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    given = batches()
    given[4][0][1] *= 1e-5
    return explainer(model), given


@pytest.mark.parametrize("head", HEADS)
def test_what_half_cannot_hold_goes_on_in_float32(tmp_path: Path, head: str) -> None:
    one, given = uneven(head)
    wanted = one.build(given, out=tmp_path / "wanted")
    largest = wanted.weights.abs().amax(1)
    assert int(largest.argmax()) == 16  # the 18th picture, one of the others being alone
    words = r"float16', which cannot hold row 16: it has a weight of (\S+), above the (\S+) that"
    with pytest.raises(ValueError, match=words) as caught:
        one.build(given, out=tmp_path / "db", storage="float16")
    value, room = map(float, re.search(words, str(caught.value)).groups())
    assert abs(value) == pytest.approx(float(largest[16]), rel=1e-3)
    assert largest[:16].max() < room < abs(value)
    assert "with storage='float32' (--storage float32) a resumed" in caught.value.__notes__[0]
    assert "kept in" in caught.value.__notes__[1]
    partial = tmp_path / "db"
    assert len(list(partial.glob("rows-*"))) == 2
    with pytest.raises(ValueError, match="cannot hold row 16"):  # as often as it is asked for
        one.build(given, out=tmp_path / "db", storage="float16", resume=True)
    passed: list[int] = []
    hook = one.network.model.register_forward_hook(lambda _, x, __: passed.append(len(x[0])))
    # In closed form it needs no images; by autograd it has to see them once more.
    with pytest.warns(UserWarning, match="are in float16 and are made again in float32"):
        built = one.build([] if head == "closed form" else given, out=tmp_path / "db", resume=True)
    hook.remove()
    assert sum(passed) == (0 if head == "closed form" else 22) + IMAGES
    assert content(built.path) == content(wanted.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["db", "wanted"]


def test_another_storage_at_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, given = explainer(common()), batches()
    wanted = one.build(given, out=tmp_path / "wanted", storage="float16")
    unfinished(one, given, tmp_path / "embedding")
    one.build(given, out=tmp_path / "embedding", storage="float16", resume=True)
    assert content(tmp_path / "embedding") == content(wanted.path)
    # Rows, all of them but for the manifest; then more shards than there will be.
    monkeypatch.setattr(shards, "SHARD_ROWS", 3)
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "report_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.build(given, out=tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("rows-*"))) == 7
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    with pytest.warns(UserWarning, match="are in float32 and are made again in float16"):
        one.build([], out=tmp_path / "rows", storage="float16", resume=True)
    assert content(tmp_path / "rows") == content(wanted.path)
    # Finished but for the name: those rows are what they are.
    with monkeypatch.context() as patch:
        patch.setattr(write.files, "rename", stopping_before("manifest.json"))
        with pytest.raises(ZeroDivisionError):
            one.build(given, out=tmp_path / "done")
    with pytest.raises(ValueError, match="begun with: storage was 'float32', is 'float16'"):
        one.build(given, out=tmp_path / "done", storage="float16", resume=True)
    assert one.build([], out=tmp_path / "done", resume=True).storage == "float32"


def changed(given: list[Any], how: str) -> list[Any]:
    given = list(given)
    images, labels, ids = given[1]
    if how == "images":
        given[1] = (images + torch.randn(images.shape), labels, ids)
    elif how == "labels":
        given[1] = (images, labels[::-1], ids)
    elif how == "ids":
        given[1] = (images, labels, ids[::-1])
    elif how == "batches":
        given[1] = (images[:3], labels[:3], ids[:3])
    else:
        given = given[:1]
    return given


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("images", r"the embedding of row \d differs"),
        ("labels", "labels differ in rows 4 to 7"),
        ("ids", "ids differ in rows 4 to 7"),
        ("batches", "ids differ|labels differ|its batches ended at image 8 before, and at 11 now"),
        ("fewer", "it gave 8 images or more before and 4 now"),
    ],
)
def test_other_images_are_refused(tmp_path: Path, how: str, words: str) -> None:
    one, given = explainer(common()), batches()
    unfinished(one, given, tmp_path / "db", after=3)
    with pytest.raises(ValueError, match=f"same images in the same order each time .*: ({words})"):
        one.build(changed(given, how), out=tmp_path / "db", resume=True)
    assert len(one.build(given, out=tmp_path / "db", resume=True)) == 21


# --- damage


def test_a_damaged_unfinished_build(tmp_path: Path) -> None:
    one, given, folder = explainer(common()), batches(), tmp_path / "db"
    partial = unfinished(one, given, folder)
    whole = content(partial)

    def refused(name: str, damaged: bytes | None, words: str, error: type[Exception]) -> None:
        if damaged is None:
            (partial / name).unlink()
        else:
            (partial / name).write_bytes(damaged)
        with pytest.raises(error, match=words):
            one.build(given, out=folder, resume=True)
        (partial / name).write_bytes(whole[name])

    damaged = gcfast.DamagedDatabaseError
    short = whole["spool-embeddings"][:50]
    refused("spool-embeddings", short, "is truncated: 192 bytes were written, it has 50", damaged)
    refused("spool-labels", None, "spool-labels is truncated: 64 .* it has 0", damaged)
    refused("head.safetensors", b"", "cannot read .*head.safetensors", damaged)
    refused("head.safetensors", None, "cannot read .*head.safetensors", damaged)
    refused("build.json", b"{", "build.json is damaged: it is not JSON", damaged)
    newer = json.loads(whole["build.json"]) | {"format_version": 2}
    refused("build.json", json.dumps(newer).encode(), "of another gcfast", gcfast.GcfastError)
    assert len(one.build(given, out=folder, resume=True)) == 21


def test_a_damaged_shard_of_an_unfinished_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, given, folder = explainer(common()), batches(), tmp_path / "db"
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "report_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.build(given, out=folder)
    shard = tmp_path / "db" / "rows-00001.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(gcfast.DamagedDatabaseError, match=r"rows-00001.safetensors is truncated"):
        one.build(given, out=folder, resume=True)
