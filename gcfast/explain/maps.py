"""From embeddings and feature maps to heat maps: the part of an explanation that is ours.

Nothing here looks at values, so nothing waits for the device; on a CUDA device an image whose
embedding is not finite gets a map of NaN where on the CPU it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcfast import ops
from gcfast.database.database import Database
from gcfast.explain.result import Explanation, Finish
from gcfast.method.elementwise import summed
from gcfast.method.proxies import Proxies, proxy_weights
from gcfast.search.transferred import Transferred

if TYPE_CHECKING:
    from gcfast.explain.calibration import Calibration


class Explained(NamedTuple):
    """What the nearest rows made of a batch."""

    maps: Tensor  # [B, OH, OW] float32
    embeddings: Tensor  # [B, D] float32
    neighbors: Tensor  # [B, K] int64
    distances: Tensor  # [B, K] float32
    labels: Tensor | None  # as in Transferred
    ratios: Tensor | None = None  # [B] float32, of a second look

    def copied(self) -> Explained:
        """The same in memory of its own."""
        return Explained(*(None if tensor is None else tensor.clone() for tensor in self))  # type: ignore[arg-type]

    def copied_maps(self) -> Explained:
        """The same, with the maps in memory of their own."""
        return self._replace(maps=self.maps.clone())

    def explanation(
        self,
        labels: Tensor | None,
        calibration: Calibration | None = None,
        class_names: Sequence[str] = (),
    ) -> Explanation:
        """With the labels [N] of the table, where they are not here, a calibration and names."""
        right = None if calibration is None else calibration.right
        return Explanation(
            maps=self.maps,
            embeddings=self.embeddings,
            neighbors=self.neighbors,
            distances=self.distances,
            labels=self.labels_from(labels),
            flat=self.maps.abs().amax((1, 2)) == 0,
            confidence=right(self.ratios) if right and self.ratios is not None else None,
            fidelity=None if calibration is None else calibration.fidelity(self.distances[:, 0]),
            class_names=class_names,
        )

    def labels_from(self, labels: Tensor | None) -> Tensor:
        """The neighbours' labels [B, K]: those here, or by the table's [N]; -1 or NaN: none."""
        if self.labels is not None:
            return self.labels
        assert labels is not None
        none = torch.nan if labels.is_floating_point() else -1
        return torch.where(self.neighbors >= 0, labels[self.neighbors.clamp(min=0)], none)


def proxies_of(database: Database, device: torch.device) -> Proxies | None:
    """The class proxies of a database on a device; None where it has none."""
    if database.classes is None:
        return None
    _ = database.shards  # compares checksums
    return Proxies.of(database.classes, device)


def marked(embeddings: Tensor, found: Transferred) -> tuple[Tensor, Tensor]:
    """Rows and mixing weights such that an embedding that is not finite gives NaN maps."""
    # 0 times what is finite if the embedding is, which is NaN where it is not, on top of each
    # weight, or of 1.
    telltale, rows = _telltale(embeddings, found), found.rows
    if found.labels is None:
        # Weights are made of the distances, and so NaN already.
        mixing = found.mixing
        return rows, torch.rsub(telltale, 1.0, alpha=0) if mixing is None else mixing
    # Some row must be weighed for NaN to reach the map: row 0.
    rows = rows * (telltale * 0 == 0)  # `where` would launch a kernel more, which fills its 0
    if found.mixing is None:
        return rows, torch.rsub(telltale, 1.0, alpha=0).expand(rows.shape)
    return rows, torch.add(found.mixing, telltale, alpha=0)


def _telltale(embeddings: Tensor, found: Transferred) -> Tensor:
    """[B, 1], finite where the embedding is."""
    if found.labels is not None:  # through an index, which finds nothing for NaN
        return embeddings.sum(1, keepdim=True)
    distances = found.distances
    return distances if distances.shape[1] == 1 else distances[:, :1]


class Steps(NamedTuple):
    """The operations between a sum at the layer's resolution and a refined map, in one form."""

    refine: Callable[[Tensor, Tensor], Tensor]
    dense_cam: Callable[..., Tensor]


CHECKED = Steps(ops.refine, ops.dense_cam)
TRUSTED = Steps(ops.refine.trusted, ops.dense_cam.trusted)


def on_images(
    cam: Callable[..., Tensor],
    share: tuple[float, float],
    finer: tuple[Tensor, ...] = (),
    steps: Steps = CHECKED,
) -> Callable[..., Tensor]:
    """``sparse_cam`` or its like for activations on a share of the images' height and width.

    Maps are 0 where no patch lies, and end where the image does. They are refined before they are
    normalized and resized, by finer outputs [B, C', H', W'] that lie on the same share.
    """
    if finer:
        cam = _refined(cam, finer, steps)
    if share == (1.0, 1.0):
        return cam

    def placed(*arguments: Any, size: tuple[int, int], **options: Any) -> Tensor:
        height, width = (max(1, round(s * part)) for s, part in zip(size, share, strict=True))
        maps = cam(*arguments, size=(height, width), **options)
        return F.pad(maps, (0, size[1] - width, 0, size[0] - height))  # below 0 it cuts off

    return placed


def _refined(
    cam: Callable[..., Tensor], finer: tuple[Tensor, ...], steps: Steps
) -> Callable[..., Tensor]:
    """``sparse_cam`` or its like with maps that are refined before they are finished."""

    def maps(
        activations: Tensor,
        *arguments: Any,
        size: tuple[int, int],
        normalize: str | None = "max",
        **options: Any,
    ) -> Tensor:
        own = (activations.shape[2], activations.shape[3])
        fine = cam(activations, *arguments, size=own, normalize=None, **options)
        for output in finer:
            fine = steps.refine(fine, output)
        one = fine.new_ones((1, 1)).expand(fine.shape[0], 1)
        return steps.dense_cam(fine[:, None], one, size=size, normalize=normalize)

    return maps


def elementwise_maps(
    activations: Tensor, gradients: Tensor, finish: Finish, cam: Callable[..., Tensor]
) -> Tensor:
    """Maps [B, OH, OW] of gradient times activation, both [B, C, H, W], by ``dense_cam``."""
    sums = summed(activations, gradients)
    return cam(sums, sums.new_ones((sums.shape[0], 1)), **finish.of_dense())


def explained(
    activations: Tensor,
    embeddings: Tensor,
    found: Transferred,
    finish: Finish,
    *,
    cam: Callable[..., Tensor],
    marks: bool,
    proxies: Proxies | None = None,
    pull_back: Callable[[Tensor], Tensor] | None = None,
) -> Explained:
    """Maps from what the nearest rows lend, or from the proxies of their classes.

    Args:
        activations: [B, C, H, W].
        embeddings: [B, D] float32.
        found: what the embeddings' neighbours lend.
        finish: how.
        cam: the operation ``sparse_cam`` where rows lend channels, else ``dense_cam``, in one of
            its forms.
        marks: give an embedding that is not finite a map of NaN, rather than rely on a check.
        proxies: of the database, if it has them; with its rows, where ``found`` has no labels.
        pull_back: where rows lend cotangents: from those of the embeddings [B, D] to gradients
            [B, C, H, W] at the layer.
    """
    if proxies is not None:
        if found.labels is None:
            assert proxies.rows is not None
            places = proxies.rows[found.neighbors]  # -1 is the last, of no row
        else:
            places = proxies.places(found.labels)
        weights = proxy_weights(activations, proxies.mixed(places, found.mixing))
        if marks:
            weights = torch.add(weights, _telltale(embeddings, found), alpha=0)  # as `marked`
        maps = cam(activations, weights, **finish.of_dense())
    elif pull_back is not None:
        cotangents = found.mixed
        if marks:
            cotangents = torch.add(cotangents, _telltale(embeddings, found), alpha=0)
        maps = elementwise_maps(activations, pull_back(cotangents), finish, cam)
    else:
        rows, mixing = marked(embeddings, found) if marks else (found.rows, found.mixing)
        maps = cam(
            activations,
            rows,
            found.channels,
            found.weights,
            mixing=mixing,
            offsets=found.offsets,
            **finish._asdict(),
        )
    return Explained(maps, embeddings, found.neighbors, found.distances, found.labels)
