"""ops.sample_triplets and ops.mean_cotangents: C++ against the reference, both against lists."""

import itertools
import math

import pytest
import torch
from helpers import clustered, guarded, norm_error, strided

from gcfast import ops, reference
from gcfast.kernels import anchor_pairs, mean_cotangents, sample_triplets
from gcfast.kernels.launch import TripletsConfig

CASES = [
    (1, 1, 1, 0.2, 3),
    (2, 3, 1, 0.2, 3),
    (30, 3, 30, 0.2, 5),  # every label once
    (97, 13, 7, 0.2, 5),
    (130, 5, 2, 2.0, 20_000),  # all pairs fit
    (200, 8, 3, 0.05, 50),
    (64, 16, 5, -0.5, 4),  # hardly any valid
    (257, 4, 10, math.inf, 7),
]


def _all_pairs(embeddings, labels, a, margin):
    """Every valid pair of row a, in order, from the definition."""
    distances = (embeddings.double() - embeddings[a].double()).square().sum(1).tolist()
    rows = range(len(labels))
    return [
        (p, n)
        for p, n in itertools.product(rows, rows)
        if labels[p] == labels[a] and p != a and labels[n] != labels[a]
        if distances[p] + margin > distances[n]
    ]


def _arguments(embeddings, labels, rows=None):
    rows = torch.arange(len(labels)) if rows is None else rows
    return embeddings[rows], labels[rows], rows, embeddings, labels


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_draws_what_the_reference_draws(case, threads):
    N, D, classes, margin, T = case
    arguments = _arguments(*clustered(N, D, classes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for first in (None, 2):
            options = {"triplets": T, "margin": margin, "seed": 2**40 + 5, "first": first}
            wanted = ops.sample_triplets(*arguments, **options, backend="reference")
            got = ops.sample_triplets(*arguments, **options)
            for name, a, b in zip(wanted._fields, wanted, got, strict=True):
                assert torch.equal(a, b), name
        wanted = ops.mean_cotangents(*arguments, margin=margin, backend="reference")
        got = ops.mean_cotangents(*arguments, margin=margin)
        torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[2], wanted[2])
    finally:
        torch.set_num_threads(before)


def test_many_threads_and_groups_give_the_same_bits():
    embeddings, labels = clustered(1500, 24, 9)  # large enough that threads are started
    arguments = _arguments(embeddings, labels)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            drawn = ops.sample_triplets(*arguments, triplets=50, margin=0.2, seed=1)
            results.append((*drawn, *ops.mean_cotangents(*arguments, margin=0.2)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


TILED = TripletsConfig(
    block_b=16, block_n=64, tile=16, block_p=32, block_t=16, block_s=4, num_warps=4,
    groups=2, splits=3,
)  # fmt: skip


def _lattice(rows, dim, classes):
    """Points of whole coordinates: distances are whole and meet at the hinge again and again."""
    return torch.randint(-1, 2, (rows, dim)).float(), torch.randint(classes, (rows,))


def _assert_same_as_reference(arguments, margin, **options):
    wanted = ops.sample_triplets(*arguments, margin=margin, **options, backend="reference")
    got = ops.sample_triplets(*arguments, margin=margin, **options, backend="triton")
    for name, a, b in zip(wanted._fields, wanted, got, strict=True):
        assert torch.equal(a, b), name
    wanted = ops.mean_cotangents(*arguments, margin=margin, backend="reference")
    got = ops.mean_cotangents(*arguments, margin=margin, backend="triton")
    torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2], wanted[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize("case", [c for c in CASES if c[-1] < 99], ids=str)
def test_triton_draws_what_the_reference_draws(case, first, device):
    N, D, classes, margin, T = case
    embeddings, labels = clustered(N, D, classes)
    guard = guarded((N, D)).copy_(embeddings).to(device)
    arguments = _arguments(guard, labels.to(device), torch.arange(min(N, 5), device=device))
    _assert_same_as_reference(arguments, margin, triplets=T, seed=2**40 + 5, first=first)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("margin", [0.0, 1.0, math.inf, -math.inf])
def test_triton_agrees_at_the_hinge_and_over_many_tiles(margin, monkeypatch, device):
    for module in (sample_triplets, mean_cotangents):
        monkeypatch.setattr(module, "sample_triplets_config", lambda *_: TILED)
    embeddings, labels = _lattice(83, 3, 3)
    rows = torch.tensor([0, 82])
    arguments = [a.to(device) for a in _arguments(embeddings, labels, rows)]
    _assert_same_as_reference(arguments, margin, triplets=40, seed=1)
    _assert_same_as_reference(arguments, margin, triplets=40, first=500)


def test_triton_takes_anchors_in_groups_and_the_table_in_slabs(monkeypatch, device):
    monkeypatch.setattr(anchor_pairs, "SCRATCH_BYTES", 28 * 70 * 2)  # two anchors a group
    monkeypatch.setattr(mean_cotangents, "SLAB_BYTES", 8 * 4 * 30)  # thirty rows a product
    monkeypatch.setattr(anchor_pairs, "TRANSPOSE_BYTES", 0)
    embeddings, labels = _lattice(70, 4, 3)
    arguments = [
        a.to(device) for a in _arguments(embeddings, labels, torch.tensor([3, 69, 8, 20, 41]))
    ]
    _assert_same_as_reference(arguments, 1.0, triplets=6)


def test_triton_takes_any_strides(device):
    embeddings, labels = (a.to(device) for a in clustered(70, 4, 3))
    arguments = _arguments(embeddings, labels, torch.arange(3, device=device))
    wanted = ops.sample_triplets(*arguments, triplets=6, margin=0.2)
    apart = [
        strided(a) if a.is_floating_point() else a.repeat_interleave(2)[::2] for a in arguments
    ]
    got = ops.sample_triplets(*apart, triplets=6, margin=0.2, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0)])
def test_triton_on_nothing(B, N, device):
    ids = torch.zeros(B + N, dtype=torch.int64, device=device)
    arguments = (torch.ones(B, 3, device=device), ids[:B], ids[:B],
                 torch.ones(N, 3, device=device), ids[:N])  # fmt: skip
    drawn = ops.sample_triplets(*arguments, triplets=4, margin=0.2, backend="triton")
    assert drawn.positives.tolist() == [[-1] * 4] * B
    assert drawn.counts.tolist() == [0] * B
    cotangents, counts, hardest = ops.mean_cotangents(*arguments, margin=0.2, backend="triton")
    assert cotangents.tolist() == [[0.0] * 3] * B
    assert counts.tolist() == [0] * B
    assert hardest.tolist() == [[-1, -1]] * B


def test_triton_leaves_rows_of_nan_out_of_every_pair(device):
    embeddings, labels = clustered(70, 4, 3)
    embeddings[5] = embeddings[66] = math.nan
    arguments = [a.to(device) for a in _arguments(embeddings, labels, torch.tensor([0, 5, 9]))]
    wanted = ops.sample_triplets(*arguments, triplets=50, margin=0.2, backend="reference")
    got = ops.sample_triplets(*arguments, triplets=50, margin=0.2, backend="triton")
    assert torch.equal(got.positives, wanted.positives)
    assert torch.equal(got.negatives, wanted.negatives)
    assert got.counts.tolist() == wanted.counts.tolist()
    assert got.counts[1] == 0
    assert got.hardest[1].tolist() == [-1, -1]


@pytest.mark.parametrize("row", [5, 66])
def test_cpp_leaves_rows_of_nan_out_of_every_pair(row):
    embeddings, labels = clustered(70, 4, 3)
    embeddings[row] = math.nan
    arguments = _arguments(embeddings, labels)
    wanted = ops.sample_triplets(*arguments, triplets=50, margin=0.2, backend="reference")
    got = ops.sample_triplets(*arguments, triplets=50, margin=0.2)
    assert got.counts.tolist() == wanted.counts.tolist()
    assert torch.equal(got.positives, wanted.positives)
    assert torch.equal(got.negatives, wanted.negatives)
    counts = ops.mean_cotangents(*arguments, margin=0.2)[1]
    assert counts.tolist() == wanted.counts.tolist()


def test_triton_gives_zeros_without_a_pair_beside_rows_of_nan(device):
    embeddings, labels = (a.to(device) for a in clustered(70, 4, 3))
    embeddings[5], labels[9] = math.nan, 7  # the only one of its label
    rows = torch.tensor([5, 9], device=device)
    for backend in ("reference", "triton"):
        cotangents, counts, _ = ops.mean_cotangents(
            *_arguments(embeddings, labels, rows), margin=0.2, backend=backend
        )
        assert counts.tolist() == [0, 0]
        assert torch.equal(cotangents, torch.zeros_like(cotangents))


def test_triton_lists_nothing_from_the_last_number_on(device):
    arguments = [a.to(device) for a in _arguments(*clustered(9, 2, 2))]
    listed = ops.sample_triplets(
        *arguments, triplets=3, margin=0.2, first=2**63 - 1, backend="triton"
    )
    assert not listed.valid.any()


def test_triton_draws_uniformly(device):
    """A chi-square test at three standard deviations, always of the same seeds."""
    embeddings, labels = (a.to(device) for a in clustered(90, 3, 4, spread=2.0))
    arguments = _arguments(embeddings, labels, torch.tensor([7], device=device))
    V = int(ops.sample_triplets(*arguments, triplets=1, margin=0.5).counts)
    T, seeds = V - 1, 12
    listed = ops.sample_triplets(*arguments, triplets=V, margin=0.5)
    number = torch.full((90, 90), -1, device=device)
    number[listed.positives[0], listed.negatives[0]] = torch.arange(V, device=device)
    seen = torch.zeros(V, dtype=torch.int64, device=device)
    wide = TILED._replace(tile=64, block_t=1024)
    for seed in range(seeds):
        drawn = sample_triplets.launch_sample_triplets(
            *arguments, triplets=T, margin=0.5, seed=seed, config=wide
        )
        seen += torch.bincount(number[drawn.positives[0], drawn.negatives[0]], minlength=V)
    expected = seeds * T / V
    chi2 = float((seen - expected).square().sum() / expected)
    assert abs(chi2 - (V - 1)) < 3 * math.sqrt(2 * (V - 1))


def test_draws_are_valid_pairs_counted_and_the_hardest_is_right():
    embeddings, labels = clustered(60, 6, 5)
    drawn = ops.sample_triplets(*_arguments(embeddings, labels), triplets=40, margin=0.2)
    for a in range(60):
        pairs = _all_pairs(embeddings, labels, a, 0.2)
        assert drawn.counts[a] == len(pairs)
        taken = list(zip(drawn.positives[a].tolist(), drawn.negatives[a].tolist(), strict=True))
        if len(pairs) <= 40:  # each once, in order
            assert taken[: len(pairs)] == pairs
            assert taken[len(pairs) :] == [(-1, -1)] * (40 - len(pairs))
        else:
            assert set(taken) <= set(pairs)
        assert drawn.valid[a].sum() == min(40, len(pairs))
        distances = (embeddings[a] - embeddings).square().sum(1)
        same = labels == labels[a]
        same[a] = False
        if same.any():
            assert drawn.hardest[a, 0] == distances.masked_fill(~same, -1).argmax()
        assert drawn.hardest[a, 1] == distances.masked_fill(labels == labels[a], 9).argmin()


def test_pages_list_every_pair_once():
    embeddings, labels = clustered(40, 4, 3)
    arguments = _arguments(embeddings, labels, torch.tensor([11]))
    pairs = _all_pairs(embeddings, labels, 11, 0.2)
    listed = []
    for first in range(0, len(pairs) + 7, 7):
        page = ops.sample_triplets(*arguments, triplets=7, margin=0.2, first=first)
        valid = page.valid[0]
        listed += zip(page.positives[0, valid].tolist(), page.negatives[0, valid].tolist(),
                      strict=True)  # fmt: skip
    assert listed == pairs


def test_draws_depend_on_seed_row_and_draw_alone():
    embeddings, labels = clustered(80, 6, 4)
    options = {"triplets": 9, "margin": 0.5, "seed": 3}
    everything = ops.sample_triplets(*_arguments(embeddings, labels), **options)
    some = torch.tensor([70, 3, 41])
    part = ops.sample_triplets(*_arguments(embeddings, labels, some), **options)
    assert torch.equal(part.positives, everything.positives[some])
    assert torch.equal(part.negatives, everything.negatives[some])
    longer = ops.sample_triplets(
        *_arguments(embeddings, labels, some), triplets=20, margin=0.5, seed=3
    )
    assert torch.equal(longer.positives[:, :9], part.positives)
    other = ops.sample_triplets(*_arguments(embeddings, labels), triplets=9, margin=0.5, seed=4)
    assert not torch.equal(other.positives, everything.positives)


def test_draws_are_uniform_over_the_valid_pairs():
    """A chi-square test at three standard deviations: 1,500 seeds of 40 draws, always the same."""
    embeddings, labels = clustered(24, 3, 3, spread=2.0)
    pairs = _all_pairs(embeddings, labels, 5, 0.5)
    V, T, seeds = len(pairs), 40, 1500
    assert V > T
    number = torch.full((24, 24), -1)
    for i, (p, n) in enumerate(pairs):
        number[p, n] = i
    seen = torch.zeros(V, dtype=torch.int64)
    for seed in range(seeds):
        drawn = ops.sample_triplets(
            *_arguments(embeddings, labels, torch.tensor([5])), triplets=T, margin=0.5, seed=seed
        )
        seen += torch.bincount(number[drawn.positives[0], drawn.negatives[0]], minlength=V)
    expected = seeds * T / V
    chi2 = float((seen - expected).square().sum() / expected)
    assert abs(chi2 - (V - 1)) < 3 * math.sqrt(2 * (V - 1))


def test_an_anchor_from_outside_the_table_keeps_its_twin():
    embeddings, labels = clustered(30, 4, 3)
    inside = ops.sample_triplets(
        embeddings[:1], labels[:1], torch.tensor([0]), embeddings, labels, triplets=4, margin=0.2
    )
    outside = ops.sample_triplets(
        embeddings[:1], labels[:1], torch.tensor([30]), embeddings, labels, triplets=4, margin=0.2
    )
    twin_pairs = sum(
        float((embeddings[0] - e).square().sum()) < 0.2
        for e, label in zip(embeddings, labels, strict=True)
        if label != labels[0]
    )
    assert outside.counts - inside.counts == twin_pairs


@pytest.mark.parametrize("margin", [0.2, math.inf])
def test_mean_cotangent_is_the_mean_over_the_list(margin):
    embeddings, labels = clustered(50, 6, 4)
    got, counts, _ = ops.mean_cotangents(*_arguments(embeddings, labels), margin=margin)
    for a in range(50):
        pairs = _all_pairs(embeddings, labels, a, margin)
        assert counts[a] == len(pairs)
        if pairs:
            p, n = torch.tensor(pairs).T
            wanted = 2 * (embeddings[n] - embeddings[p]).double().mean(0)
            assert norm_error(got[a : a + 1], wanted[None]) < 1e-5  # worst seen 2e-7
        else:
            assert got[a].abs().sum() == 0


def test_philox_known_answers():
    """The test vectors of Random123, kat_vectors (Salmon et al., SC 2011)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, wanted in cases:
        assert tuple(int(word) for word in reference.philox(counter, key)) == wanted


def test_ranks_match_big_integers():
    rows, counts = torch.tensor([0, 5, 2**33 + 1]), torch.tensor([1, 1000, 2**45 + 12345])
    ranks = reference.uniform_ranks(rows, 4, counts, 9)
    for b, t in itertools.product(range(3), range(4)):
        counter = (t, int(rows[b]) & 0xFFFFFFFF, int(rows[b]) >> 32, 0)
        low, high, _, _ = (int(word) for word in reference.philox(counter, 9))
        assert int(ranks[b, t]) == ((high << 32 | low) * int(counts[b])) >> 64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"anchors": torch.ones(2, 4).double()}, TypeError, "`anchors` must have dtype float32"),
        ({"embeddings": torch.ones(5, 3)}, ValueError, r"`embeddings` .* with D = 4"),
        ({"labels": torch.ones(4).long()}, ValueError, r"`labels` must have shape \[N\]"),
        ({"labels": torch.ones(5)}, TypeError, "`labels` must have dtype int64"),
        ({"margin": float("nan")}, ValueError, "`margin` must be a number"),
        ({"seed": -1}, ValueError, "`seed` must be from 0 to"),
        ({"triplets": 0}, ValueError, "`triplets` must be at least 1"),
        ({"first": -1}, ValueError, "`first` must be at least 0"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of 'auto', 'triton', 'reference'"),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_bad_input(change, error, words):
    arguments = {
        "anchors": torch.ones(2, 4),
        "anchor_labels": torch.zeros(2).long(),
        "anchor_rows": torch.arange(2),
        "embeddings": torch.ones(5, 4),
        "labels": torch.zeros(5).long(),
        "triplets": 3,
        "margin": 0.2,
        **change,
    }
    with pytest.raises(error, match=words):
        ops.sample_triplets(**arguments)
