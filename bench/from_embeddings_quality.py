"""What is lost without labels, and through an index that compresses, on the drawn birds.

    python bench/from_embeddings_quality.py [--json FILE]

The pictures, the network and the scores are those of `gcfast demo` (seed 0; 648 rows, 216 pictures
of unseen species): the share of a map's heat inside the bird's box, its outline and the part that
tells its species, by `explain_batch` with its defaults. Databases are built from the network's
embeddings of the training pictures: with their labels, with what `labels=` makes in their place,
and with labels from FAISS indexes. Of the latter reported are also the lowest cosine that a build
finds between a picture's embedding and its row (both less the mean of all rows), the mean cosine of
the maps with those of the uncompressed embeddings, and how many of a row's channels are the same.
With labels the rows must be those of a build from the pictures.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import faiss
import torch
from paired import conditions
from torch import Tensor

import gcfast
from gcfast.demo.network import load_network
from gcfast.demo.run import Score, draw_pictures, scored
from gcfast.metrics import region_sums

LAYER, SAMPLE, CHECKED = "features", 216, 108
WITHOUT = ("neighbors:1", "neighbors:3", "neighbors:5", "kmeans:10", "kmeans:27", "kmeans:100")
INDEXES = ("SQfp16", "SQ8", "SQ6", "SQ4", "PQ32x4", "PQ16x4")


class Birds:
    """The demonstration's network and pictures, with the embeddings of the training ones."""

    def __init__(self) -> None:
        self.network = load_network()
        train, unseen = draw_pictures(0, 24, 8)
        batches = list(train)
        self.images = torch.cat([images for images, _, _ in batches])
        self.names = [name for _, names, _ in batches for name in names]
        self.train = train
        self.unseen = list(scored(unseen.pictures))
        with torch.no_grad():
            self.embeddings = torch.cat([self.network(images) for images, _, _ in batches])

    def from_images(self) -> gcfast.Explainer:
        explainer = gcfast.Explainer(self.network, LAYER)
        explainer.build(self.train)
        return explainer

    def given(self, embeddings: Any, labels: Any) -> gcfast.Explainer:
        explainer = gcfast.Explainer(self.network, LAYER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            explainer.build_from_embeddings(
                embeddings,
                labels,
                sample=self.images[:SAMPLE],
                check=(self.images[:CHECKED], range(CHECKED)),
                min_cosine=-1.0,
            )
        return explainer

    def maps(self, explainer: gcfast.Explainer) -> Tensor:
        """Maps of the unseen pictures [B, S, S]."""
        return torch.cat([explainer.explain_batch(images) for images, _ in self.unseen])

    def scores(self, maps: Tensor) -> dict[str, float]:
        parts, first = [], 0
        for images, truth in self.unseen:
            some = maps[first : first + len(images)]
            parts.append(region_sums(some[:, None], Score().regions(truth)).shares()[:, 0])
            first += len(images)
        means = torch.cat(parts).mean(0).tolist()
        return dict(zip(("box", "mask", "part"), means, strict=True))


def same_channels(one: gcfast.Database, two: gcfast.Database) -> float:
    """The mean share of a row's channels that are in the other's row."""
    pairs = zip(one.channels, two.channels, strict=True)
    return float(torch.tensor([float(torch.isin(a, b).float().mean()) for a, b in pairs]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    birds = Birds()
    built = birds.from_images()
    labelled = birds.given(birds.embeddings, birds.names)
    assert built.database is not None
    assert labelled.database is not None
    assert torch.equal(built.database.channels, labelled.database.channels)
    exact = birds.maps(labelled)
    found: dict[str, Any] = {
        "conditions": conditions(),
        "largest_difference_from_a_build": float((exact - birds.maps(built)).abs().max()),
        "without_labels": {"labels": birds.scores(exact)},
        "indexes": {},
    }
    print(found, flush=True)
    for labels in WITHOUT:
        maps = birds.maps(birds.given(birds.embeddings, labels))
        found["without_labels"][labels] = birds.scores(maps)
        print(labels, found["without_labels"][labels], flush=True)
    for factory in INDEXES:
        index = faiss.index_factory(birds.embeddings.shape[1], factory)
        index.train(birds.embeddings.numpy())
        index.add(birds.embeddings.numpy())
        one = birds.given(index, birds.names)
        assert one.database is not None
        maps = birds.maps(one)
        found["indexes"][factory] = {
            "lowest_cosine": one.database.manifest["from_embeddings"]["lowest_cosine"],
            "map_cosine": float(torch.cosine_similarity(maps.flatten(1), exact.flatten(1)).mean()),
            "same_channels": same_channels(one.database, labelled.database),
        } | birds.scores(maps)
        print(factory, found["indexes"][factory], flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
