"""A database on its network, ready to answer, and what an answer says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gcfast
from gcfast.database.database import Database
from gcfast.database.files import require_file
from gcfast.database.manifest import version_of
from gcfast.images.preprocessing import Preprocessing


class Neighbor(NamedTuple):
    """A row that an explanation rests on."""

    row: int
    id: str
    label: str
    distance: float  # squared L2


class Answer(NamedTuple):
    """What one picture's explanation is."""

    heat: NDArray[np.float32]  # [H, W] in [0, 1]
    neighbors: list[Neighbor]  # nearest first
    flat: bool
    confidence: float | None
    fidelity: float | None


class PairAnswer(NamedTuple):
    """What a pair's explanation is."""

    heats: tuple[NDArray[np.float32], NDArray[np.float32]]  # [H, W] in [0, 1] each
    similarity: float  # cosine of the embeddings
    rests: tuple[float, float]  # of it, what no place of the one or the other accounts for


@dataclass(frozen=True, eq=False)
class Served:
    """An explainer with a database, and how pictures are prepared for it.

    Attributes:
        explainer: has a database.
        preprocessing: of its pictures.
        images: the folder that the ids of its rows are paths in; None: their pictures are not
            shown.
    """

    explainer: gcfast.Explainer
    preprocessing: Preprocessing
    images: Path | None = None
    database: Database = field(init=False, repr=False)
    version: str = field(init=False)  # of the database: another one after any change

    def __post_init__(self) -> None:
        database = self.explainer.attach().database
        object.__setattr__(self, "database", database)
        object.__setattr__(self, "version", version_of(database.manifest))

    def explain(self, views: Sequence[NDArray[Any]], *, center: float = 0.0) -> list[Answer]:
        """Explain views of one shape, as :meth:`Preprocessing.load` gives them, in one batch.

        Raises:
            ValueError: the network gives no finite embedding for one of them.
        """
        images = self.batch([*views, *[views[-1]] * self.padding(len(views))])
        why = self.explainer.explain_batch(images, details=True, center=center)
        maps = why.maps[: len(views)].float().cpu().numpy()
        if not np.isfinite(maps).all():  # where values are not looked at, on a CUDA device
            raise ValueError("the network gives no finite embedding")
        neighbors, distances, names = (
            why.neighbors.tolist(),
            why.distances.tolist(),
            why.label_names,
        )
        return [
            Answer(
                heat,
                [
                    Neighbor(row, shown_id(self.database.ids[row]), name, distance)
                    for row, name, distance in zip(
                        neighbors[i], names[i], distances[i], strict=True
                    )
                    if row >= 0
                ],
                bool(why.flat[i]),
                *(None if of is None else float(of[i]) for of in (why.confidence, why.fidelity)),
            )
            for i, heat in enumerate(maps)
        ]

    def explain_pairs(self, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[PairAnswer]:
        """Explain pairs of views, all of one shape, in one batch.

        Raises:
            UnsupportedModelError: a network whose pairs cannot be explained.
        """
        why = self.explainer.explain_pair(
            *(self.batch(views) for views in zip(*pairs, strict=True))
        )
        queries, matches = (maps.float().cpu().numpy() for maps in (why.query, why.match))
        numbers = zip(
            why.similarity.tolist(), why.query_rest.tolist(), why.match_rest.tolist(), strict=True
        )
        return [
            PairAnswer((queries[i], matches[i]), similarity, (rest, other_rest))
            for i, (similarity, rest, other_rest) in enumerate(numbers)
        ]

    def batch(self, views: Sequence[NDArray[Any]]) -> Tensor:
        """Return the network's input [B, 3, H, W] of views of one shape, on its device."""
        images = self.preprocessing.normalize(torch.from_numpy(np.stack(views)))
        return images.to(self.device)

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.explainer.network.device(torch.device("cpu"))

    def padding(self, count: int) -> int:
        """Return how many views to add to a batch: on a GPU up to the next power of two.

        The CUDA graphs that explain_batch keeps are few, and one is of one batch size.
        """
        return (1 << (count - 1).bit_length()) - count if self.device.type == "cuda" else 0

    def warm_up(self, center: float) -> None:
        """Explain a grey picture, so that nothing is left to be made for the first request."""
        if self.preprocessing.transform is None:
            self.explain([np.full((*self.preprocessing.shape, 3), 128, np.uint8)], center=center)

    def picture_of(self, row: int) -> NDArray[Any] | None:
        """Return the view of a row's picture; None where it is not shown, or cannot be read."""
        if self.images is None:
            return None
        root = self.images.resolve()
        path = (root / self.database.ids[row]).resolve()
        if not path.is_relative_to(root):
            return None
        try:
            require_file(path)
            return self.preprocessing.load(path).values
        except Exception:  # whatever Pillow raises, or a transform
            return None

    def drawable(self, view: NDArray[Any]) -> NDArray[np.uint8]:
        """Return a view as uint8 [H, W, 3]; what a ``transform`` gave is stretched to 0 to 255."""
        if self.preprocessing.transform is None:
            return view
        drawn: NDArray[np.uint8] = self.preprocessing.pictures(torch.from_numpy(view)[None])[0]
        return drawn

    def place(self, size: tuple[int, int], heat: NDArray[Any]) -> dict[str, Any] | None:
        """Return what leads from a map back to its picture of size (w, h).

        Column ``u`` and row ``v`` of the map, counted from 0, are at x = x0 + (u + 0.5) · scale_x
        and y = y0 + (v + 0.5) · scale_y. None where a ``transform`` does not say.
        """
        if self.preprocessing.transform is not None:
            return None
        x0, y0, x1, y1 = self.preprocessing.window(size)
        return {
            "size": [size[1], size[0]],
            "x0": x0,
            "y0": y0,
            "scale_x": (x1 - x0) / heat.shape[1],
            "scale_y": (y1 - y0) / heat.shape[0],
        }


def shown_id(name: str) -> str:
    """Return a row's id; of an absolute path, which would tell where files are, the last part."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(name)
        if path.is_absolute():
            return path.name
    return name
