"""ops.sample_triplets and ops.mean_cotangents: C++ against the reference, both against lists."""

import itertools
import math

import pytest
import torch
from helpers import clustered, guarded, norm_error, strided

from gcfast import ops, reference
from gcfast.kernels import mean_cotangents
from gcfast.kernels.triplets import scan, thresholds

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
        for first, tries in ((None, 0), (None, 1024), (2, None)):
            options = {"triplets": T, "margin": margin, "seed": 2**40 + 5}
            options |= {"first": first, "tries": tries}
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
    # Large enough that threads are started.
    embeddings, labels = clustered(1500, 24, 9, spread=1.2)
    arguments = _arguments(embeddings, labels)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for tries in (0, 4096):
                options = {"triplets": 20, "margin": 0.2, "seed": 1, "tries": tries}
                results.append(
                    (
                        *ops.sample_triplets(*arguments, **options),
                        *ops.mean_cotangents(*arguments, margin=0.2),
                    )
                )
    finally:
        torch.set_num_threads(before)
    assert not results[1][5].all(), "some are not scanned"
    for wanted, *others in (results[::2], results[1::2]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))


def _lattice(rows, dim, classes):
    """Points of whole coordinates: distances are whole and meet at the hinge again and again."""
    return torch.randint(-1, 2, (rows, dim)).float(), torch.randint(classes, (rows,))


def _assert_same_as_reference(arguments, margin, backend="triton", **options):
    wanted = ops.sample_triplets(*arguments, margin=margin, **options, backend="reference")
    got = ops.sample_triplets(*arguments, margin=margin, **options, backend=backend)
    for name, a, b in zip(wanted._fields, wanted, got, strict=True):
        assert torch.equal(a, b), name
    wanted = ops.mean_cotangents(*arguments, margin=margin, backend="reference")
    got = ops.mean_cotangents(*arguments, margin=margin, backend=backend)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2], wanted[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("first", "tries"), [(None, 0), (None, 1024), (2, None)])
@pytest.mark.parametrize("case", [c for c in CASES if c[-1] < 99], ids=str)
def test_triton_draws_what_the_reference_draws(case, first, tries, device):
    N, D, classes, margin, T = case
    embeddings, labels = clustered(N, D, classes)
    guard = guarded((N, D)).copy_(embeddings).to(device)
    arguments = _arguments(guard, labels.to(device), torch.arange(min(N, 5), device=device))
    options = {"triplets": T, "seed": 2**40 + 5, "first": first, "tries": tries}
    _assert_same_as_reference(arguments, margin, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("few", [4, 4096])  # negatives that are listed for an anchor
@pytest.mark.parametrize("margin", [0.0, 1.0, math.inf, -math.inf])
def test_triton_agrees_at_the_hinge(margin, few, monkeypatch, device):
    monkeypatch.setattr(scan, "FEW_NEGATIVES", few)
    monkeypatch.setattr(thresholds, "SLAB_ROWS", 40)
    embeddings, labels = _lattice(83, 3, 3)
    arguments = [a.to(device) for a in _arguments(embeddings, labels, torch.tensor([0, 82]))]
    for tries in (0, 2048):
        _assert_same_as_reference(arguments, margin, triplets=40, seed=1, tries=tries)
    _assert_same_as_reference(arguments, margin, triplets=40, first=500)


@pytest.mark.parametrize("margin", [0.0, 1.0, math.inf, -math.inf])
def test_cpp_agrees_at_the_hinge(margin):
    embeddings, labels = _lattice(900, 3, 3)
    arguments = _arguments(embeddings, labels, torch.arange(40))
    for tries in (0, 2048):
        _assert_same_as_reference(arguments, margin, "auto", triplets=40, seed=1, tries=tries)
    _assert_same_as_reference(arguments, margin, "auto", triplets=40, first=500)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_what_float32_cannot_square_is_measured_in_float64(scale, backend, device):
    embeddings, labels = _lattice(300, 3, 3)
    embeddings = embeddings * scale
    if backend == "triton":
        embeddings, labels = embeddings.to(device), labels.to(device)
    arguments = _arguments(embeddings, labels, torch.arange(3, device=embeddings.device))
    for tries in (0, 1024):
        _assert_same_as_reference(arguments, scale**2, backend, triplets=40, tries=tries)


@pytest.mark.parametrize("few", [4, 4096])
def test_triton_takes_anchors_in_groups_and_the_table_in_slabs(few, monkeypatch, device):
    monkeypatch.setattr(scan, "SCRATCH_BYTES", 2 * 4 * 70)  # two anchors with steps
    monkeypatch.setattr(scan, "FEW_NEGATIVES", few)
    monkeypatch.setattr(mean_cotangents, "WEIGHTS_BYTES", 0)
    monkeypatch.setattr(mean_cotangents, "SLAB_BYTES", 8 * 4 * 30)  # thirty rows a product
    embeddings, labels = _lattice(70, 4, 3)
    arguments = [
        a.to(device) for a in _arguments(embeddings, labels, torch.tensor([3, 69, 8, 20, 41]))
    ]
    _assert_same_as_reference(arguments, 1.0, triplets=6)


def test_cpp_halves_a_group_that_finds_too_many_rows():
    """Every row is a negative under every threshold: 64 anchors are too many at once."""
    embeddings, labels = clustered(300_000, 2, 2)
    arguments = _arguments(embeddings, labels, torch.arange(70))
    counts = (labels == labels[:70, None]).sum(1)
    drawn = ops.sample_triplets(*arguments, triplets=3, margin=math.inf, tries=0)
    assert torch.equal(drawn.counts, (counts - 1) * (len(labels) - counts))
    assert (labels[drawn.positives] == labels[:70, None]).all()
    assert (labels[drawn.negatives] != labels[:70, None]).all()


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


def _seen(embeddings, labels, margin, T, copies, tries, backend="auto"):
    """(how often each valid pair of a copy of row 7 was drawn [V], were all scanned for)."""
    N = len(labels)
    one = torch.full((1,), N, device=labels.device)
    arguments = (embeddings[7:8], labels[7:8], one, embeddings, labels)
    V = int(ops.sample_triplets(*arguments, triplets=1, margin=margin, tries=0).counts)
    assert V > T
    listed = ops.sample_triplets(*arguments, triplets=V, margin=margin, first=0)
    number = torch.full((N, N), -1, device=labels.device)
    number[listed.positives[0], listed.negatives[0]] = torch.arange(V, device=labels.device)
    # Every copy is an anchor of its own from outside the table.
    rows = N + torch.arange(copies, device=labels.device)
    drawn = ops.sample_triplets(
        embeddings[7:8].expand(copies, -1).contiguous(),
        labels[7:8].expand(copies).contiguous(),
        *(rows, embeddings, labels),
        triplets=T,
        margin=margin,
        seed=1,
        tries=tries,
        backend=backend,
    )
    assert drawn.valid.all()
    taken = number[drawn.positives, drawn.negatives].flatten()
    return torch.bincount(taken, minlength=V), set(drawn.exact.tolist())


def _assert_uniform(seen):
    """A chi-square test at three standard deviations, always of the same seeds."""
    freedom, expected = len(seen) - 1, float(seen.sum()) / len(seen)
    chi2 = float((seen - expected).square().sum() / expected)
    assert abs(chi2 - freedom) < 3 * math.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize("tries", [0, 4096])
def test_triton_draws_uniformly(tries, device):
    embeddings, labels = (a.to(device) for a in clustered(90, 3, 4, spread=2.0))
    seen, scanned = _seen(embeddings, labels, 0.5, 120, 40, tries, "triton")
    assert scanned == {tries == 0}
    _assert_uniform(seen)


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


# Scanned, tried, and tried so little that some draws are left for the scan.
@pytest.mark.parametrize(("tries", "expected"), [(0, {True}), (4096, {False}), (256, {True})])
def test_draws_are_uniform_over_the_valid_pairs(tries, expected):
    seen, scanned = _seen(*clustered(60, 3, 3, spread=1.2), 0.2, 120, 2000, tries)
    assert scanned == expected
    _assert_uniform(seen)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_draw_is_the_same_however_many_are_made_and_whether_a_scan_follows(backend):
    embeddings, labels = clustered(300, 6, 4)
    arguments = _arguments(embeddings, labels, torch.arange(30))
    draws = {
        T: ops.sample_triplets(
            *arguments, triplets=T, margin=0.2, seed=3, tries=1024, backend=backend
        )
        for T in (5, 40, 300)
    }
    assert 0 < int(draws[40].exact.sum()) < 30
    many = draws[300].counts > 300
    assert many.any()
    assert draws[300].exact.all()
    for T in (5, 40):
        for b in many.nonzero().flatten():
            assert torch.equal(draws[T].positives[b], draws[300].positives[b, :T])
            assert torch.equal(draws[T].negatives[b], draws[300].negatives[b, :T])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tries_never_take_the_place_of_the_few_valid_pairs(backend):
    """However often these are tried: no number of repetitions shows that there are more than T."""
    embeddings, labels = clustered(90, 3, 10, spread=1.0)
    arguments = _arguments(embeddings, labels)
    options = {"triplets": 120, "margin": 0.2, "backend": backend}
    scanned = ops.sample_triplets(*arguments, **options, tries=0)
    tried = ops.sample_triplets(*arguments, **options, tries=2**20)
    few = scanned.counts <= 120
    plenty = scanned.counts > 400  # among 242 draws from so many there are 121 different ones
    assert few.sum() > 5
    assert plenty.sum() > 5
    assert tried.exact[few].all()
    assert not tried.exact[plenty].any()
    for name in ("positives", "negatives", "counts", "hardest"):
        assert torch.equal(getattr(tried, name)[few], getattr(scanned, name)[few])


def test_estimated_counts_are_right_on_average():
    embeddings, labels = clustered(400, 6, 4, spread=1.0)
    arguments = _arguments(embeddings, labels, torch.arange(20))
    exact = ops.sample_triplets(*arguments, triplets=1, margin=0.2, tries=0).counts
    options = {"triplets": 30, "margin": 0.2, "tries": 2**16}
    drawn = [ops.sample_triplets(*arguments, **options, seed=seed) for seed in range(400)]
    assert not any(one.exact.any() for one in drawn)
    assert all((one.hardest == -1).all() for one in drawn)
    mean = torch.stack([one.counts for one in drawn]).double().mean(0)
    # An estimate from T + 1 finds is off by a share of 1 / sqrt(T - 1) at most.
    assert ((mean / exact - 1).abs() < 4 / math.sqrt(29 * 400)).all()


def test_with_an_infinite_margin_every_try_counts():
    embeddings, labels = clustered(5000, 4, 10)
    arguments = _arguments(embeddings, labels, torch.arange(5))
    drawn = ops.sample_triplets(*arguments, triplets=50, margin=math.inf)
    assert not drawn.exact.any()
    own = torch.bincount(labels)[labels[:5]]
    assert torch.equal(drawn.counts, (own - 1) * (5000 - own))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_order_of_labels_may_be_given(backend, device):
    embeddings, labels = clustered(300, 3, 4)
    if backend == "triton":
        embeddings, labels = embeddings.to(device), labels.to(device)
    arguments = _arguments(embeddings, labels, torch.arange(4, device=labels.device))
    order = reference.label_order(labels)
    for run, more in (
        (ops.sample_triplets, {"triplets": 9, "tries": 1024}),
        (ops.mean_cotangents, {}),
    ):
        wanted = run(*arguments, margin=0.2, backend=backend, **more)
        got = run(*arguments, order, margin=0.2, backend=backend, **more)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e12, 1e25])
def test_a_sketch_changes_no_draw(scale):
    for embeddings, labels in (_lattice(300, 3, 3), clustered(300, 20, 4)):
        embeddings = embeddings * scale
        embeddings[7], embeddings[8] = math.nan, 0
        arguments = _arguments(embeddings, labels, torch.arange(40))
        order = reference.label_order(labels)
        sketch = reference.label_sketch(embeddings, order)
        for margin in (0.0, 0.2 * scale**2, math.inf):
            options = {"triplets": 20, "margin": margin, "tries": 2048}
            wanted = ops.sample_triplets(*arguments, order, **options)
            got = ops.sample_triplets(*arguments, order, sketch, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_row_is_as_near_to_its_sketch_as_that_says():
    embeddings = torch.randn(50, 9) * 10.0 ** torch.randint(-20, 20, (50, 1))
    embeddings[3] = 0
    order = torch.randperm(50)
    sketch = reference.label_sketch(embeddings, order)
    codes = sketch[:, :9].view(torch.int8).double()
    scale, radius = sketch[:, 9:].contiguous().view(torch.float32).double().T
    off = (embeddings[order].double() - scale[:, None] * codes).norm(dim=1)
    assert (off <= radius).all()
    # Codes are half a step off at most.
    assert (radius <= 1.01 * scale / 2 * 3 + 1e-30).all()


@pytest.mark.parametrize("bad", [-1, 300])
def test_cpp_reads_no_row_that_is_not_there(bad):
    embeddings, labels = clustered(300, 3, 4)
    arguments = _arguments(embeddings, labels)
    order = torch.full((300,), bad)
    for tries in (0, 1024):
        with pytest.raises(ValueError, match="`by_label` must hold the numbers of all rows"):
            ops.sample_triplets(*arguments, order, triplets=9, margin=0.2, tries=tries)
    with pytest.raises(ValueError, match="`by_label` must hold"):
        ops.mean_cotangents(*arguments, order, margin=0.2)


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
        ({"tries": -1}, ValueError, "`tries` must be from 0 to"),
        ({"tries": 2**31}, ValueError, "`tries` must be from 0 to"),
        ({"by_label": torch.zeros(4).long()}, ValueError, r"`by_label` must have shape \[N\]"),
        ({"by_label": torch.zeros(5)}, TypeError, "`by_label` must have dtype int64"),
        ({"sketch": torch.zeros(5, 4).byte()}, ValueError, r"`sketch` must have shape \[N, W\]"),
        ({"sketch": torch.zeros(5, 12)}, TypeError, "`sketch` must have dtype uint8"),
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
