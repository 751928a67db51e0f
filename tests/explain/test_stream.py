"""explain_stream: explain_batch for one batch after another."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import DIM, common, loader, pictures
from torch import Tensor

import gcfast
from gcfast.explain.stream import overlapped


@pytest.fixture(params=["exact", "Flat"])
def explainer(request: pytest.FixtureRequest) -> gcfast.Explainer:
    if request.param != "exact":
        pytest.importorskip("faiss")
    one = gcfast.Explainer(common(), "backbone", channels=5, k=2, index=request.param)
    one.build(loader(*pictures(30)))
    return one


def batches(count: int = 5) -> list[Tensor]:
    return [pictures(1 + i)[0] for i in range(count)]


@pytest.mark.parametrize(
    "options", [{}, {"size": 5, "normalize": None, "relu": False, "center": 0.5}], ids=str
)
def test_it_gives_what_explain_batch_gives(explainer: Any, options: dict[str, Any]) -> None:
    given = batches()
    given.insert(2, torch.zeros(0, 3, 8, 6))
    got = list(explainer.explain_stream(iter(given), **options))
    wanted = [explainer.explain_batch(images, **options) for images in given]
    assert len(got) == len(wanted)
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)


def test_details(explainer: gcfast.Explainer) -> None:
    given = batches()
    for images, why in zip(given, explainer.explain_stream(given, details=True), strict=True):
        wanted = explainer.explain_batch(images, details=True)
        for name in ("maps", "embeddings", "neighbors", "distances", "labels", "flat"):
            assert torch.equal(getattr(why, name), getattr(wanted, name)), name


def test_under_inference_mode_and_without(explainer: gcfast.Explainer) -> None:
    given = batches()
    wanted = [explainer.explain_batch(images) for images in given]
    with torch.inference_mode():
        inside = list(explainer.explain_stream(given))
    for one, two in zip(inside, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_no_batches_and_one(explainer: gcfast.Explainer) -> None:
    assert list(explainer.explain_stream([])) == []
    (maps,) = explainer.explain_stream([pictures(2)[0]])
    assert maps.shape == (2, 8, 8)


def test_there_must_be_a_database() -> None:
    with pytest.raises(gcfast.NoDatabaseError, match="there is no database to explain from"):
        gcfast.Explainer(common(), "backbone").explain_stream([])


def test_one_batch_is_read_ahead(explainer: gcfast.Explainer) -> None:
    read: list[int] = []

    def reading() -> Iterator[Tensor]:
        for number, images in enumerate(batches()):
            read.append(number)
            yield images

    stream = explainer.explain_stream(reading())
    assert read == []
    for taken in range(5):
        next(stream)
        assert len(read) == min(taken + 2, 5)
    assert next(stream, None) is None


def test_an_exception_comes_after_the_batches_before_it(explainer: gcfast.Explainer) -> None:
    good = batches(3)

    def breaking() -> Iterator[Tensor]:
        yield from good
        raise OSError("no more pictures")

    for given, error, words in (
        ([*good, torch.full((1, 3, 8, 8), float("nan")), good[0]], ValueError, "NaN"),
        ([*good, None, good[0]], TypeError, "`images` must be a torch.Tensor, got NoneType"),
        (breaking(), OSError, "no more pictures"),
    ):
        stream = explainer.explain_stream(given)
        got = []
        with pytest.raises(error, match=words):
            got.extend(stream)  # what came before the exception is in it
        assert len(got) == 3
        assert next(stream, None) is None


def test_bad_options_come_with_the_first_batch(explainer: gcfast.Explainer) -> None:
    with pytest.raises(ValueError, match="`normalize` must be one of"):
        next(explainer.explain_stream(batches(), normalize="min"))


def test_an_index_that_raises_stops_the_stream() -> None:
    faiss = pytest.importorskip("faiss")

    class Moody(faiss.IndexFlatL2):  # type: ignore[misc,name-defined]
        def search(self, queries: Any, k: int) -> Any:
            if len(queries) == 3:
                raise LookupError("not three")
            return super().search(queries, k)

    index = Moody(DIM)
    one = gcfast.Explainer(common(), "backbone", channels=5, index=index)
    index.add(one.build(loader(*pictures(30))).embeddings.numpy())
    stream = one.explain_stream(batches())
    assert len(next(stream)) == 1
    assert len(next(stream)) == 2
    with pytest.raises(LookupError, match="not three"):
        next(stream)
    assert next(stream, None) is None
    assert len(one.explain_batch(batches()[1])) == 2


def test_a_stream_that_is_left_early_keeps_nothing(explainer: gcfast.Explainer) -> None:
    stream = explainer.explain_stream(batches())
    next(stream)
    assert stream.gi_frame is not None  # type: ignore[attr-defined]
    stream.close()  # type: ignore[attr-defined]
    assert next(stream, None) is None
    for _ in explainer.explain_stream(batches()):
        break
    list(explainer.explain_stream(batches()))


def test_the_model_runs_while_the_index_is_searched() -> None:
    faiss = pytest.importorskip("faiss")
    forward, searched = threading.Event(), threading.Event()

    class Waiting(faiss.IndexFlatL2):  # type: ignore[misc,name-defined]
        def search(self, queries: Any, k: int) -> Any:
            # Only the forward pass of the next batch lets the search of the first one end.
            if len(queries) == 1:
                assert forward.wait(20)
                searched.set()
            return super().search(queries, k)

    model = common()
    index = Waiting(DIM)
    one = gcfast.Explainer(model, "backbone", channels=5, index=index)
    index.add(one.build(loader(*pictures(30))).embeddings.numpy())

    def note(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        del module, output
        if len(args[0]) == 2:
            assert not searched.is_set()
            forward.set()

    handle = model.register_forward_hook(note)
    assert [len(maps) for maps in one.explain_stream(batches(2))] == [1, 2]
    assert searched.is_set()
    handle.remove()


def test_activations_are_held_for_one_batch_more(explainer: gcfast.Explainer) -> None:
    alive: list[weakref.ref[torch.UntypedStorage]] = []  # several tensors may share one
    most = 0

    def note(module: Any, args: Any, output: Tensor) -> None:
        del module, args
        gc.collect()
        alive.append(weakref.ref(output.untyped_storage()))
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))

    handle = explainer.network.model.get_submodule("backbone").register_forward_hook(note)
    for _ in explainer.explain_stream(pictures(2)[0] for _ in range(8)):
        pass
    handle.remove()
    gc.collect()
    assert most == 2
    assert not any(ref() is not None for ref in alive)


def test_overlapped_finishes_in_order_and_as_late_as_asked() -> None:
    events: list[str] = []

    def begin(number: int) -> Any:
        events.append(f"begin {number}")
        return lambda: events.append(f"finish {number}") or number

    assert list(overlapped(range(4), begin, 2)) == [0, 1, 2, 3]
    assert events[:4] == ["begin 0", "begin 1", "begin 2", "finish 0"]
    events.clear()
    assert list(overlapped(range(2), begin, 0)) == [0, 1]
    assert events == ["begin 0", "finish 0", "begin 1", "finish 1"]
