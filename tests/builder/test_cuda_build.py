"""Building on a GPU that is pretended (pretend_cuda.py), beside building on the CPU."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from cuda_case import agree, needs_no_gpu
from networks import CHANNELS, common, loader, other, pictures

import gcfast
from gcfast import Explainer

pytestmark = needs_no_gpu

# Where a build looks at values, by design: once a batch of rows, not once a row.
BUILD_WAITS = {
    ("event", "offload.py:finish"),  # a batch behind
    ("read", "head.py:_error"), ("read", "head.py:agrees"), ("read", "head.py:_from_jacobian"),
    ("read", "head.py:_from_modules"), ("read", "layers.py:_candidate"),
    ("read", "pairs.py:_with_hardest"), ("download", "fingerprint.py:fingerprint"),
}  # fmt: skip
LISTING_WAITS = {("read", "pairs.py:all"), ("read", "rows.py:<genexpr>")}
SECOND_PASS_WAITS = {("download", "embed.py:check_embeddings")}


def same_rows(ours, wanted, *, tolerance=1e-4):
    assert torch.equal(ours.embeddings.argsort(1), wanted.embeddings.argsort(1))
    torch.testing.assert_close(ours.embeddings, wanted.embeddings, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.labels, wanted.labels)
    assert torch.equal(ours.triplet_counts, wanted.triplet_counts)
    dense = [
        torch.zeros(len(d), CHANNELS).scatter_(1, d.channels, d.weights) for d in (ours, wanted)
    ]
    torch.testing.assert_close(*dense, atol=tolerance * float(dense[1].abs().max()), rtol=tolerance)
    torch.testing.assert_close(ours.offsets, wanted.offsets, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("triplets", [5, "all"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("head", [common, other])
def test_build(cuda, head, method, triplets, monkeypatch):
    monkeypatch.setattr(gcfast.method.pairs, "LIST_CHUNK", 16)  # interpreted, 4,096 take minutes
    model = head().eval()
    settings = {"channels": CHANNELS, "triplets": triplets, "method": method}
    given = loader(*pictures(9))
    wanted = Explainer(model, **settings).build(given)
    ours = Explainer(cuda.cuda(copy.deepcopy(model)), **settings)
    cuda.waits.clear(), cuda.uploads.clear()
    built = ours.build(given)
    assert not built.embeddings.is_cuda
    same_rows(built, wanted)
    closed = "_head_mean_kernel" in cuda.launches or "_head_plus_kernel" in cuda.launches
    assert closed == (head is common)
    allowed = BUILD_WAITS | (SECOND_PASS_WAITS if head is other else set())
    if triplets == "all" and method == "gradcam++":
        allowed = allowed | LISTING_WAITS
    assert set(cuda.waits) <= allowed
    batches = Counter(wait.where for wait in cuda.waits)
    assert batches["offload.py:finish"] == (2 + 1 if head is common else 2 + 2)


@pytest.mark.parametrize("resident", [True, False])
def test_build_whose_table_stays_on_the_host(cuda, monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1, 2))
    model, given = other().eval(), loader(*pictures(9))
    wanted = Explainer(model, channels=CHANNELS, triplets=5).build(given)
    ours = Explainer(cuda.cuda(copy.deepcopy(model)), channels=CHANNELS, triplets=5)
    same_rows(ours.build(given), wanted)
    assert ("_draws_kernel" in cuda.launches) == resident


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
def test_build_with_other_objectives(cuda, objective, triplets):
    model = common().eval()
    settings = {"channels": CHANNELS, "triplets": triplets, "objective": objective}
    given = loader(*pictures(6))
    wanted = Explainer(model, **settings).build(given)
    ours = Explainer(cuda.cuda(copy.deepcopy(model)), **settings)
    same_rows(ours.build(given), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("head", [common, other])
def test_build_in_other_precisions(cuda, head, dtype):
    model, given = head().eval(), loader(*pictures(9))
    settings = {"channels": CHANNELS, "triplets": 5}
    if dtype is not None:
        model = model.to(dtype)
    moved = cuda.cuda(copy.deepcopy(model))
    ours, plain = Explainer(moved, **settings), Explainer(model, **settings)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        got = ours.build(given)
        maps = ours.explain_labelled(cuda.cuda(given[0][0].to(dtype)), given[0][1])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        wanted = plain.build(given)
        wanted_maps = plain.explain_labelled(given[0][0].to(dtype), given[0][1])
    same_rows(got, wanted, tolerance=2e-2)
    agree(maps, wanted_maps, atol=5e-2)
    assert ("_head_mean_kernel" in cuda.launches) == (head is common)


def test_append_rebuild_and_a_folder(cuda, tmp_path):
    model = common().eval()
    ours = Explainer(cuda.cuda(copy.deepcopy(model)), channels=CHANNELS, triplets=5)
    plain = Explainer(model, channels=CHANNELS, triplets=5)
    given, more = loader(*pictures(9)), loader(*pictures(6))
    for explainer, folder in ((ours, tmp_path / "ours"), (plain, tmp_path / "plain")):
        explainer.build(given, out=folder)
        explainer.append(more)
    same_rows(ours.database, plain.database)
    images = pictures(3)[0]
    agree(ours.explain_batch(cuda.cuda(images)), plain.explain_batch(images))
    for explainer in (ours, plain):
        explainer.rebuild(given)
    same_rows(ours.database, plain.database)
