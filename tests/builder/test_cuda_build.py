"""Building on a GPU, beside building on the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cuda_case import agree
from helpers import norm_error
from networks import CHANNELS, common, loader, other, pictures

import gcfast
from gcfast import Explainer

pytestmark = pytest.mark.cuda


def same_rows(ours, wanted, *, tolerance=1e-4):
    assert torch.equal(ours.embeddings.argsort(1), wanted.embeddings.argsort(1))
    torch.testing.assert_close(ours.embeddings, wanted.embeddings, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.labels, wanted.labels)
    assert torch.equal(ours.triplet_counts, wanted.triplet_counts)
    dense = [weights(d) for d in (ours, wanted)]
    torch.testing.assert_close(*dense, atol=tolerance * float(dense[1].abs().max()), rtol=tolerance)
    torch.testing.assert_close(ours.offsets, wanted.offsets, atol=1e-4, rtol=1e-3)


def weights(database):
    """[N, C], zero where a channel was not kept."""
    return torch.zeros(len(database), CHANNELS).scatter_(1, database.channels, database.weights)


def both(gpu, model, **settings):
    """An explainer on the CPU, and one on the GPU."""
    settings = {"channels": CHANNELS, "triplets": 5, **settings}
    return Explainer(model, **settings), Explainer(copy.deepcopy(model).to(gpu), **settings)


@pytest.mark.parametrize("triplets", [5, "all"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("head", [common, other])
def test_build(gpu, head, method, triplets):
    plain, ours = both(gpu, head().eval(), triplets=triplets, method=method)
    given = loader(*pictures(9))
    built = ours.build(given)
    assert not built.embeddings.is_cuda
    same_rows(built, plain.build(given))


def test_waits_do_not_grow_with_the_batches(gpu):
    """Copies of one batch are collected while the next one runs, by an event."""
    model = common().eval().to(gpu)

    def waits(batches):
        given = [pictures(4) for _ in range(batches)]
        Explainer(model, channels=CHANNELS, triplets=5).build(given)  # compiles the kernels
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                Explainer(model, channels=CHANNELS, triplets=5).build(given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    assert waits(12) == waits(4) > 0


@pytest.mark.parametrize("resident", [True, False])
def test_build_whose_table_stays_on_the_host(gpu, monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1, 2))
    plain, ours = both(gpu, other().eval())
    given = loader(*pictures(9))
    same_rows(ours.build(given), plain.build(given))


@pytest.mark.parametrize(
    "objective",
    [
        gcfast.PairDistance("positive"),
        gcfast.DistanceDifference(),
        lambda a, p, n: ((a - p).square().sum(1) - (a - n).square().sum(1) + 0.1).relu(),
    ],
    ids=["pair", "difference", "function"],
)
@pytest.mark.parametrize("triplets", [3, "all"])
def test_build_with_other_objectives(gpu, objective, triplets):
    plain, ours = both(gpu, common().eval(), triplets=triplets, objective=objective)
    given = loader(*pictures(6))
    same_rows(ours.build(given), plain.build(given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("head", [common, other])
def test_build_in_other_precisions(gpu, head, dtype):
    # So wide that every pair is valid, on either side of a rounding.
    settings = {"triplets": "all", "objective": gcfast.TripletLoss(margin=100.0)}
    plain, ours = both(gpu, head().eval().to(dtype), **settings)
    given = loader(*pictures(9))
    images, labels = given[0][0].to(dtype), given[0][1]
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        got, maps = ours.build(given), ours.explain_labelled(images.to(gpu), labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        wanted, wanted_maps = plain.build(given), plain.explain_labelled(images, labels)
    # About twice what a build in float32 differs by from one in this precision.
    eps = torch.finfo(dtype or torch.bfloat16).eps
    torch.testing.assert_close(got.embeddings, wanted.embeddings, atol=eps, rtol=0)
    assert torch.equal(got.triplet_counts, wanted.triplet_counts)
    assert norm_error(weights(got), weights(wanted)) < 15 * eps
    agree(maps, wanted_maps, atol=20 * eps)


def test_append_rebuild_and_a_folder(gpu, tmp_path):
    plain, ours = both(gpu, common().eval())
    given, more = loader(*pictures(9)), loader(*pictures(6))
    for explainer, folder in ((ours, tmp_path / "ours"), (plain, tmp_path / "plain")):
        explainer.build(given, out=folder)
        explainer.append(more)
    same_rows(ours.database, plain.database)
    images = pictures(3)[0]
    agree(ours.explain_batch(images.to(gpu)), plain.explain_batch(images))
    for explainer in (ours, plain):
        explainer.rebuild(given)
    same_rows(ours.database, plain.database)
