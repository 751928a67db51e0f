"""Eight threads on one Explainer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import resident
from networks import CHANNELS, DIM, Lambda, Net, common, loader, other, pictures
from torch import Tensor, nn

import gcfast

THREADS, CALLS = 8, 10_000


def together(work: Callable[[int], Tensor]) -> list[Tensor]:
    """work(0) … work(7), all at once."""
    barrier = Barrier(THREADS)

    def run(number: int) -> Tensor:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize("kind", ["first call", "warm"])
@pytest.mark.parametrize("make", [common, other], ids=["common", "other"])
def test_threads_get_the_maps_of_their_own_images(make: Callable[[], Net], kind: str) -> None:
    model = make().train()
    images, labels = pictures(6)
    built = gcfast.Explainer(model, channels=5)
    database = built.build(loader(images, labels))
    given = [pictures(2)[0] for _ in range(THREADS)]
    wanted = [(built.explain_batch(x), built.explain_labelled(x, [0, 1])) for x in given]
    one = built if kind == "warm" else gcfast.Explainer(model, database=database, channels=5)

    def work(number: int) -> Tensor:
        for _ in range(5):
            own = one.explain_labelled(given[number], [0, 1])
            maps = one.explain_batch(given[number])
        return torch.stack([maps, own])

    for (maps, own), got in zip(wanted, together(work), strict=True):
        torch.testing.assert_close(got, torch.stack([maps, own]), rtol=1e-4, atol=1e-5)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_threads_find_the_layer_once() -> None:
    one = gcfast.Explainer(common(), channels=5)
    images, _ = pictures(2)
    together(lambda _: one.network.embed(images).activations)
    assert one.layer_name == "backbone"
    assert not any(module._forward_hooks for module in one.network.model.modules())


def test_a_thread_whose_model_raises_does_not_disturb_the_others() -> None:
    def head(maps: Tensor) -> Tensor:
        if maps.shape[2] == 5:
            raise KeyError("this one's image")
        return linear(maps.mean((2, 3)))

    linear = nn.Linear(CHANNELS, DIM)
    model = Net(Lambda(head)).train()
    one = gcfast.Explainer(model, "backbone", channels=5)
    one.build(loader(*pictures(6)))
    images, _ = pictures(2)
    wanted = one.explain_batch(images)

    def work(number: int) -> Tensor:
        for _ in range(5):
            if number % 2:
                with pytest.raises(KeyError, match="this one's image"):
                    one.explain_batch(torch.zeros(1, 3, 10, 10))
            else:
                torch.testing.assert_close(one.explain_batch(images), wanted)
        return wanted

    together(work)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_two_explainers_of_one_model_do_not_see_each_other() -> None:
    model = common()
    images, labels = pictures(6)
    pair = [gcfast.Explainer(model, layer, channels=5) for layer in ("backbone", "backbone.stem")]
    for one in pair:
        one.build(loader(images, labels))
    wanted = [one.explain_batch(images) for one in pair]
    got = together(lambda number: pair[number % 2].explain_batch(images))
    for number, maps in enumerate(got):
        torch.testing.assert_close(maps, wanted[number % 2])


@pytest.mark.slow
def test_many_calls_equal_the_serial_ones_and_leave_no_memory() -> None:
    """Eight threads with 10,000 calls each."""
    images, labels = pictures(6)
    one = gcfast.Explainer(common(), "backbone", channels=5)
    one.build(loader(images, labels))
    given = [pictures(1)[0] for _ in range(THREADS)]
    wanted = [one.explain_batch(x) for x in given]

    def work(number: int) -> Tensor:
        same = all(
            torch.equal(one.explain_batch(given[number]), wanted[number]) for _ in range(CALLS)
        )
        return torch.tensor(same)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many calls as threads: none of them should wait for another's
    try:
        together(lambda number: one.explain_batch(given[number]))
        held = resident()
        assert all(together(work))
        assert resident() - held < 16 << 20
    finally:
        torch.set_num_threads(before)
