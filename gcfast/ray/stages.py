"""What actors do in the two stages of a build; see :mod:`gcfast.ray.distributed`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gcfast._extras import import_ray
from gcfast.builder.embed import Totals, forward, other_images
from gcfast.builder.loader import check_embeddings, on_device
from gcfast.builder.rows import Rows
from gcfast.builder.spool import KeptSpool
from gcfast.method.head import AffineHead
from gcfast.method.settings import Settings
from gcfast.model.network import Network
from gcfast.ray import parts
from gcfast.ray.actors import PictureActor
from gcfast.ray.pictures import Batch, Prepare, spread

# What stage 2 gives for each image, the columns of a RowTable after "found".
ROW_COLUMNS = ("found", "channels", "weights", "offsets", "counts", "exact")


class EmbedAll(PictureActor):
    """Stage 1 in an actor: as :class:`Embed`, with all that the rows are made from."""

    def __init__(
        self,
        prepare: Prepare,
        id: str,
        network: Network,
        settings: Settings,
        head: AffineHead | None,
    ) -> None:
        super().__init__(prepare, None)
        self.id = id
        self.network = network
        self.settings = settings
        self.head = _on(head, self.device)
        network.model.to(self.device)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the columns of stage 1 in place of pictures."""
        rest, images, good = self.read(batch)
        images = on_device(images, self.network)
        made, pixels = forward(self.network, images, self.settings, self.head)
        columns = {name: column.cpu() for name, column in made.items()}
        n = len(good)
        sums = np.full(n, b"", dtype=object)
        if good.any():
            try:
                check_embeddings(columns["embeddings"], images)
            except ValueError as error:
                first = rest[self.id][good][0]
                raise ValueError(f"{error}, counted from the picture {first!r}") from None
            sums[int(good.argmax())] = columns["sums"].numpy().tobytes()
        rest |= {
            name: spread(columns[name].numpy()[: good.sum()], good)
            for name in ("embeddings", "norms", "pooled", "directions")
            if name in columns
        }
        agreed = np.full(n, bool(columns.get("agreed", False)))
        return rest | {"sums": sums, "pixels": np.full(n, pixels), "agreed": agreed}


class Weigh:
    """Stage 2 in an actor, from the spool: the rows of ``count`` images from one on."""

    def __init__(
        self,
        network: Network,
        settings: Settings,
        folder: Path,
        spool: dict[str, Any],
        totals: Totals,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network.model.to(device)
        totals.head = _on(totals.head, device)
        self.network = network
        self.settings = settings
        self.embedded = totals.embedded(KeptSpool(folder, spool, read=True))
        self.whole = Rows(network, self.embedded, settings)

    def __call__(self, batch: Batch, count: int) -> Batch:
        """Return the rows of ``count`` images, from the batch's one on."""
        first = int(batch["image"][0])
        return self.rows(first, min(first + count, len(self.embedded.ids)), ())

    def rows(self, first: int, stop: int, loader: Iterable[Any]) -> Batch:
        """Return the rows of consecutive images, as columns; ``loader`` has the images."""
        whole = self.embedded
        some = whole._replace(
            embeddings=whole.embeddings[first:stop],
            labels=whole.labels[first:stop],
            ids=whole.ids[first:stop],
            norms=None if whole.norms is None else whole.norms[first:stop],
            pixels=None if whole.pixels is None else whole.pixels[first:stop],
            pooled=None if whole.pooled is None else whole.pooled[first:stop],
        )
        everyone = (whole.embeddings, whole.labels)
        rows = Rows(
            self.network,
            some,
            self.settings,
            everyone=everyone,
            first=first,
            source=self.whole.source,
        )
        columns = self.columns(stop - first)
        for made in rows.made(loader):
            shard = made.rows
            values = (
                torch.ones(len(made.images), dtype=torch.bool),
                *(shard.channels, shard.weights, shard.offsets, shard.triplet_counts),
                made.exact,
            )
            for name, part in zip(ROW_COLUMNS, values, strict=True):
                columns[name][made.images.numpy()] = part.numpy()
        return {"image": np.arange(first, stop)} | columns

    def columns(self, n: int) -> Batch:
        """Return the columns of n images without rows."""
        return {
            "found": np.zeros(n, np.bool_),
            "channels": np.zeros((n, self.whole.m), np.int64),
            "weights": np.zeros((n, self.whole.width), np.float32),
            "offsets": np.zeros(n, np.float32),
            "counts": np.zeros(n, np.int64),
            "exact": np.zeros(n, np.bool_),
        }


class SecondPass(PictureActor):
    """Stage 2 in an actor, by a second pass over the pictures."""

    def __init__(self, prepare: Prepare, id: str, label: str, known: Any, *context: Any) -> None:
        super().__init__(prepare, None)
        self.weigh = Weigh(*context)
        self.id = id
        self.label = label
        self.ids, self.numbers = import_ray("gcfast.ray.build").get(known)

    def __call__(self, batch: Batch) -> Batch:
        """Return the rows of the batch's images, as :meth:`Weigh.rows` has them."""
        rest, images, good = self.read(batch)
        ids = [str(name) for name in rest[self.id][good]]
        labels = rest[self.label][good]
        at = parts.places(self.ids, parts.encoded(ids)) if ids else np.zeros(0, np.int64)
        if (at < 0).any():
            raise other_images(f"{ids[int(at.argmin())]!r} was not among them")
        numbers = self.numbers[at]
        made: list[Batch] = [{"image": np.zeros(0, np.int64)} | self.weigh.columns(0)]
        # In a data set that is in the order of the rows all of a batch are consecutive.
        for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(numbers) != 1) + 1):
            if not len(run):
                continue
            some = slice(int(run[0]), int(run[-1]) + 1)
            first = int(numbers[some.start])
            loader = [(images[some], labels[some].tolist(), ids[some])]
            made.append(self.weigh.rows(first, first + len(run), loader))
        joined = {name: np.concatenate([one[name] for one in made]) for name in made[0]}
        columns = {
            name: spread(values, good, -1 if name == "image" else 0)
            for name, values in joined.items()
        }
        return {self.id: rest[self.id]} | columns


def _on(head: AffineHead | None, device: torch.device) -> AffineHead | None:
    if head is None:
        return None
    return head._replace(weight=head.weight.to(device), bias=head.bias.to(device))
