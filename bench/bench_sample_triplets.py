"""ops.sample_triplets and ops.mean_cotangents: the C++ backend beside the reference."""

import pytest
import torch
import torch.nn.functional as F

from gcfast import ops

N, D, CLASSES, ANCHORS = 4_000, 128, 200, 32


@pytest.fixture(scope="module")
def arguments():
    torch.manual_seed(0)
    labels = torch.arange(N) % CLASSES
    table = F.normalize(torch.randn(CLASSES, D)[labels] + 1.5 * torch.randn(N, D), dim=1)
    rows = torch.arange(ANCHORS)
    return table[rows], labels[rows], rows, table, labels


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_draws(benchmark, arguments, backend):
    benchmark.group = f"{ANCHORS} anchors, N = {N}, D = {D}, T = 50"
    drawn = benchmark(ops.sample_triplets, *arguments, triplets=50, margin=0.2, backend=backend)
    assert drawn.valid.all()
    assert (drawn.counts > 50).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_means(benchmark, arguments, backend):
    benchmark.group = f"{ANCHORS} anchors, N = {N}, D = {D}, all valid pairs"
    cotangents, counts, _ = benchmark(ops.mean_cotangents, *arguments, margin=0.2, backend=backend)
    assert cotangents.isfinite().all()
    assert (counts > 50).all()
