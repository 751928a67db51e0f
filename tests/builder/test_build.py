"""The database's weights against a plain loop by autograd, and what build refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import norm_error
from loops import LOSSES, Oracle, dense, hinged, smooth, squared, valid_pairs
from networks import (
    AFFINE_HEADS,
    CHANNELS,
    OTHER_HEADS,
    Net,
    TokenNet,
    common,
    loader,
    other,
    pictures,
)
from torch import Tensor, nn

import gcfast
from gcfast import ops
from gcfast.builder.build import in_memory
from gcfast.builder.embed import embed
from gcfast.builder.rows import Rows

N = 9
LOOPED = (0, 4, 8)  # rows that the loop is run for
CLOSE = 1e-5  # norm-relative, a row
HEADS = {"closed form": common, "autograd": other}
BOTH = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
METHODS = pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
EVIDENCE = pytest.mark.parametrize("evidence", ["for", "against"])


def built(
    model: nn.Module, layer: str = "backbone", count: int = N, **settings: object
) -> tuple[gcfast.Database, Tensor, Tensor]:
    images, labels = pictures(count)
    settings.setdefault("channels", "all")
    settings.setdefault("objective", gcfast.DistanceDifference())  # every pair is valid
    explainer = gcfast.Explainer(model, layer, **settings)  # type: ignore[arg-type]
    return explainer.build(loader(images, labels)), images, labels


def loop(
    model: nn.Module,
    database: gcfast.Database,
    images: Tensor,
    pairs: Callable[[int], list[tuple[int, int]]],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    method: str,
    evidence: str,
    **oracle: object,
) -> Tensor:
    oracle.setdefault("layer", "backbone")
    one = Oracle(model, **oracle)  # type: ignore[arg-type]
    f = database.embeddings
    rows = [
        one.weights(images[row], [(f[p], f[n]) for p, n in pairs(row)], loss, method, evidence)
        for row in LOOPED
    ]
    return torch.stack(rows)


def loop_over_all(
    model: nn.Module,
    database: gcfast.Database,
    images: Tensor,
    labels: Tensor,
    method: str,
    **oracle: object,
) -> Tensor:
    def pairs(row: int) -> list[tuple[int, int]]:
        return valid_pairs(database.embeddings, labels.tolist(), row)

    return loop(
        model, database, images, pairs, LOSSES["DistanceDifference"], method, "for", **oracle
    )


def got(database: gcfast.Database, channels: int = CHANNELS) -> Tensor:
    return dense(database, channels)[list(LOOPED)]


@EVIDENCE
@METHODS
@BOTH
def test_all_triplets_equal_the_loop_over_every_pair(
    make: Callable[[], Net], method: str, evidence: str
) -> None:
    model = make()
    images, labels = pictures(N)
    settings = {"triplets": "all", "method": method, "evidence": evidence, "channels": "all"}
    f = gcfast.Explainer(model, "backbone", **settings).build([(images, labels)]).embeddings
    middle = []
    for row in LOOPED:
        pairs = valid_pairs(f, labels.tolist(), row)
        gaps = [squared(f[row], f[n]) - squared(f[row], f[p]) for p, n in pairs]
        middle.append(torch.stack(gaps).median())
    margin = float(
        max(middle)
    )  # at which half of the pairs of one row are valid, and more of others
    explainer = gcfast.Explainer(
        model, "backbone", objective=gcfast.TripletLoss(margin), **settings
    )
    database = explainer.build(loader(images, labels))
    listed = [valid_pairs(database.embeddings, labels.tolist(), r, margin) for r in range(N)]
    assert all(listed[row] for row in LOOPED)
    assert sum(len(listed[row]) for row in LOOPED) < 36, "the margin must leave something out"
    wanted = loop(
        model, database, images, listed.__getitem__, LOSSES["TripletLoss"], method, evidence
    )
    assert norm_error(got(database), wanted) < CLOSE
    assert database.triplet_counts.tolist() == [len(pairs) for pairs in listed]
    assert database.manifest["closed_form"] is (make is common)


@pytest.mark.parametrize("triplets", [1, 7, 50])
@METHODS
@BOTH
def test_drawn_triplets_equal_the_loop_over_the_same_draws(
    make: Callable[[], Net], method: str, triplets: int
) -> None:
    model = make()
    database, images, labels = built(
        model, triplets=triplets, method=method, seed=5, objective=gcfast.TripletLoss(5.0)
    )
    drawn = ops.sample_triplets(
        database.embeddings,
        labels,
        torch.arange(N),
        database.embeddings,
        labels,
        triplets=triplets,
        margin=5.0,
        seed=5,
    )

    def pairs(row: int) -> list[tuple[int, int]]:
        chosen = drawn.valid[row]
        return list(
            zip(
                drawn.positives[row][chosen].tolist(),
                drawn.negatives[row][chosen].tolist(),
                strict=True,
            )
        )

    wanted = loop(model, database, images, pairs, LOSSES["TripletLoss"], method, "for")
    assert norm_error(got(database), wanted) < CLOSE


OBJECTIVES = {
    "DistanceDifference": (gcfast.DistanceDifference(), LOSSES["DistanceDifference"]),
    "PairDistance positive": (
        gcfast.PairDistance("positive"),
        LOSSES["PairDistance positive"],
    ),
    "PairDistance negative": (
        gcfast.PairDistance("negative"),
        LOSSES["PairDistance negative"],
    ),
    "smooth function": (smooth, smooth),
    "hinged function": (hinged, hinged),
}


@pytest.mark.parametrize(
    ("method", "triplets"), [("gradcam", 50), ("gradcam", "all"), ("gradcam++", "all")]
)
@BOTH
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_equals_the_loop(
    name: str, make: Callable[[], Net], method: str, triplets: int | str
) -> None:
    objective, loss = OBJECTIVES[name]
    model = make()
    # 12 pairs a row at most: with 50 draws each is used once.
    database, images, labels = built(model, triplets=triplets, method=method, objective=objective)
    f = database.embeddings.double()

    def pairs(row: int) -> list[tuple[int, int]]:
        every = valid_pairs(f, labels.tolist(), row)
        if objective is hinged:
            return [
                (p, n) for p, n in every if hinged(f[row][None], f[p][None], f[n][None]).item() > 0
            ]
        return every

    wanted = loop(model, database, images, pairs, loss, method, "for")
    assert norm_error(got(database), wanted) < CLOSE
    counts = {"PairDistance positive": 2, "PairDistance negative": 6}
    assert database.triplet_counts.tolist() == [
        counts.get(name, len(pairs(row))) for row in range(N)
    ]
    if objective is hinged and make is common:
        assert int(database.triplet_counts.sum()) < 12 * N, "the hinge must leave something out"


@pytest.mark.parametrize("name", [*AFFINE_HEADS, *OTHER_HEADS])
def test_every_head_equals_the_loop(name: str) -> None:
    model = Net({**AFFINE_HEADS, **OTHER_HEADS}[name](CHANNELS))
    database, images, labels = built(model, triplets="all", method="gradcam++")
    wanted = loop_over_all(model, database, images, labels, "gradcam++")
    assert norm_error(got(database), wanted) < CLOSE
    assert database.manifest["closed_form"] is (name in AFFINE_HEADS)


@METHODS
def test_tokens_equal_the_loop(method: str) -> None:
    model, grid = TokenNet(), gcfast.TokenGrid()
    database, images, labels = built(model, "first", triplets="all", method=method, reshape=grid)
    wanted = loop_over_all(
        model,
        database,
        images,
        labels,
        method,
        layer="first",
        reshape=grid,
    )
    assert norm_error(got(database), wanted) < CLOSE


@METHODS
def test_an_earlier_layer_equals_the_loop(method: str) -> None:
    model = common()
    database, images, labels = built(model, "backbone.stem", triplets="all", method=method)
    wanted = loop_over_all(
        model,
        database,
        images,
        labels,
        method,
        layer="backbone.stem",
    )
    assert norm_error(got(database, 8), wanted) < CLOSE
    assert not database.manifest["closed_form"]


@METHODS
@BOTH
def test_vectors_that_are_not_normalised_equal_the_loop(
    make: Callable[[], Net], method: str
) -> None:
    model = make()
    database, images, labels = built(model, triplets="all", method=method, l2_normalize=False)
    assert not torch.allclose(database.embeddings.norm(dim=1), torch.ones(N))
    wanted = loop_over_all(
        model,
        database,
        images,
        labels,
        method,
        l2_normalize=False,
    )
    assert norm_error(got(database), wanted) < CLOSE


@METHODS
@BOTH
def test_rows_of_some_of_the_images(make: Callable[[], nn.Module], method: str) -> None:
    """Given all embeddings and their own first number, they are those of the whole build."""
    one = gcfast.Explainer(make(), "backbone", channels=5, triplets=4, method=method)
    images, labels = pictures(12)
    given = loader(images, labels, 4)
    embedded = embed(one.network, given, one.settings)
    whole, _ = in_memory(one.network, given, embedded, one.settings)
    for first in (0, 4):
        part = slice(first, first + 8)
        columns = {
            name: value[part]
            for name, value in embedded._asdict().items()
            if name in ("embeddings", "labels", "ids", "norms", "pixels", "pooled")
            and value is not None
        }
        rows = Rows(
            one.network,
            embedded._replace(**columns),
            one.settings,
            everyone=(embedded.embeddings, embedded.labels),
            first=first,
        )
        (made,) = rows.made(given[first // 4 : first // 4 + 2])
        assert made.images.tolist() == list(range(8))
        assert made.ids == whole.ids[part]
        assert torch.equal(made.rows.channels, whole.channels[part])
        assert torch.equal(made.rows.triplet_counts, whole.triplet_counts[part])
        torch.testing.assert_close(made.rows.weights, whole.weights[part], rtol=1e-4, atol=1e-7)
