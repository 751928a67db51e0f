"""How faithful transferred maps are to the test images' own maps, on a sample of the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcfast.evaluation.table import upsampled
from gcfast.evaluation.ways import (
    CONTROL_CHANNELS,
    TRIPLETS,
    Query,
    Trained,
    Way,
    drawn,
    grad_weights,
    low_resolution_maps,
    strongest,
)
from gcfast.explain.calibration import Fidelity
from gcfast.method.pairs import Cotangents, PairSource
from gcfast.method.partners import Anchors
from gcfast.metrics import cosine, flat_maps, spearman

FIDELITY_IMAGES = 256


class FidelitySample:
    """Some test images, kept until all labels are known, and then given triplets of their own.

    An image of a class that the database knows draws from the database, as
    :meth:`gcfast.Explainer.explain_labelled` does. One of another class has its positives among the
    test images; its negatives are the other classes of both.

    Args:
        trained: the training images after their pass.
        step: every how many images one is sampled, until there are FIDELITY_IMAGES.
    """

    def __init__(self, trained: Trained, step: int) -> None:
        self.trained = trained
        self.step = step
        self.queries: list[Query] = []
        self.maps: list[Tensor] = []
        self.controls: list[Tensor] = []
        self.at: list[Tensor] = []  # numbers of the sampled images among the labelled ones
        self.embeddings: list[Tensor] = []  # of all labelled images
        self.labels: list[str] = []

    def add(
        self, query: Query, labels: Sequence[str], maps: Tensor, controls: Tensor, first: int
    ) -> None:
        """Add a batch.

        Args:
            query: B images after their pass.
            labels: their B class names.
            maps: [B, H, W], transferred from the nearest row.
            controls: [B, H, W], transferred from a random row.
            first: number of the first image among the test images.
        """
        taken = (torch.arange(first, first + len(labels)) % self.step == 0).nonzero().flatten()
        taken = taken[: FIDELITY_IMAGES - sum(map(len, self.at))]
        self.at.append(taken + len(self.labels))
        self.labels += labels
        self.embeddings.append(query.embeddings.cpu())
        if len(taken):
            chosen = taken.to(maps.device)
            kept = query if self.trained.refines else query._replace(finer=())
            self.queries.append(kept.at(chosen))
            self.maps.append(maps[chosen])
            self.controls.append(controls[chosen])

    def fidelity(self) -> Fidelity | None:
        """Return the agreement of the sampled images; None if none of them has a triplet."""
        if not self.queries:
            return None
        database, settings = self.trained.database, self.trained.settings
        at, embeddings = torch.cat(self.at), torch.cat(self.embeddings)
        labels, first_new = self._numbers()
        known, others = labels[at] < first_new, labels >= first_new
        hardest = settings.on_no_triplet == "hardest"
        plain = PairSource(
            settings.objective, database.embeddings, database.labels, hardest=hardest
        )
        widened = PairSource(
            settings.objective,
            torch.cat([database.embeddings, embeddings[others]]),
            torch.cat([database.labels, labels[others]]),
            hardest=hardest,
        )
        own_row = len(database) + others.cumsum(0) - 1
        no_row = torch.full_like(own_row, len(database))
        parts = []
        for source, chosen, rows in ((plain, known, no_row), (widened, ~known, own_row)):
            images = at[chosen]
            if len(images):
                anchors = Anchors(embeddings[images], labels[images], rows[images])
                part = drawn(source, anchors, TRIPLETS, settings.seed)
                parts.append(self._agreement(chosen.nonzero().flatten(), part))
        unknown = len(at) - sum(len(one) for one in parts)
        if unknown == len(at):
            return None
        return Fidelity(
            torch.cat([one.distances for one in parts]),
            torch.cat([one.cosine for one in parts]),
            torch.cat([one.spearman for one in parts]),
            sum(one.flat for one in parts),
            unknown,
            torch.cat([one.control for one in parts if one.control is not None]),
        )

    def _numbers(self) -> tuple[Tensor, int]:
        """Numbers of the labelled images' classes, and the first that the database lacks."""
        database = self.trained.database
        names = database.class_names or sorted({str(i) for i in database.labels.tolist()})
        numbers = (
            {name: i for i, name in enumerate(names)}
            if database.class_names
            else {name: int(name) for name in names}
        )
        first_new = int(database.labels.max()) + 1 + len(names)
        strangers = sorted(set(self.labels) - set(numbers))
        numbers |= {name: first_new + i for i, name in enumerate(strangers)}
        return torch.tensor([numbers[label] for label in self.labels]), first_new

    def _agreement(self, chosen: Tensor, part: Cotangents) -> Fidelity:
        """Fidelity of sampled images [b] by number, for their own cotangents, if they have any."""
        found = part.valid.any(1)
        device = self.trained.device
        shapes = {tuple(q.activations.shape[2:]) for q in self.queries}
        assert len(shapes) == 1  # all views of a network have one size
        whole = Query.joined(self.queries)
        kept = chosen[found].to(device)
        query = whole.at(kept)
        weights = grad_weights(
            self.trained,
            Cotangents(part.values[found], part.valid[found], part.counts[found]),
            "gradcam",
            "for",
            embeddings=query.embeddings,
            norms=query.norms,
            pixels=torch.full((len(kept),), query.pixels, device=device),
            pooled=query.pooled,
        )
        way = Way("own", strongest(weights, [CONTROL_CHANNELS])[0])
        (own,) = low_resolution_maps(self.trained, query, [way], (0.0,))
        lent, control = torch.cat(self.maps)[kept], torch.cat(self.controls)[kept]
        # Fine enough for both correlations, and far cheaper to rank than at the images' size.
        H, W = lent.shape[1:]
        large = upsampled(torch.stack([own[:, 0], lent, control], 1), (8 * H, 8 * W))
        mine, given, random = large.unbind(1)
        return Fidelity(
            query.distances.cpu(),
            cosine(mine, given).cpu(),
            spearman(mine, given).cpu(),
            int((flat_maps(mine) | flat_maps(given)).sum()),
            0,
            cosine(mine, random).cpu(),
        )
