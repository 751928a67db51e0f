"""What a map can be relied on for: fidelity and confidence, measured on held-out labelled images.

Fidelity: transfer gives an image the grad-weights of its nearest row instead of its own. For images
with labels the own map can be made as well (:meth:`gcfast.Explainer.explain_labelled`), so their
agreement can be measured as a function of the distance to the row. Fitted to held-out images, that
function gives the agreement to be expected at any distance. It separates images only if agreement
falls with distance, and is evidence for the neighbor only if it is above the agreement of a random
row's map. Neither is certain, so both are measured: :class:`Fidelity` has a random row's agreement
for each image, :class:`Calibration` its mean. In images of a single object any row's map finds the
object (bench/RESULTS.md).

Confidence: how probable it is that the map's class is the image's, see
:class:`gcfast.explain.confidence.Confidence`.

Both hold for images like those they were fitted to, of the database's classes; for others they are
too high.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gcfast import ops
from gcfast._checks import require_finite_rows, require_shape
from gcfast._progress import length, tracked
from gcfast.builder.loader import batches, on_device
from gcfast.database.manifest import CALIBRATION
from gcfast.errors import DamagedDatabaseError
from gcfast.explain.confidence import Confidence
from gcfast.explain.direct.own_maps import cotangent_maps, proxy_maps
from gcfast.explain.maps import on_images, proxies_of
from gcfast.explain.result import Finish
from gcfast.method.labels import numbers_like
from gcfast.method.settings import ELEMENTWISE
from gcfast.metrics import auroc, cosine, flat_maps, spearman
from gcfast.metrics.controls import random_rows

if TYPE_CHECKING:
    from gcfast.database.database import Database
    from gcfast.explain.explainer import Explainer
    from gcfast.model.network import Network

MOST_KNOTS = 20
IMAGES_A_KNOT = 10
SAME_IMAGE = 1e-6  # squared distance below which an image counts as the row's own


@dataclass(frozen=True)
class Fidelity:
    """Agreement of each image's transferred map with the map from its own triplets.

    Attributes:
        distances: [n] float32, squared L2 to the nearest row.
        cosine: [n] float32, of the two maps; 0 where one of them is flat.
        spearman: [n] float32, their rank correlation; 0 where one of them is flat.
        flat: how many images have at least one flat map of the two.
        unknown: how many images were left out because the database has no row of their class.
        control: [n] float32, or None: the cosine of the image's own map with the map that a random
            row gives instead of the nearest. Maps of one object agree whatever the channel weights;
            only the excess over this is due to the neighbor.
        right: [n] bool, or None: whether the map's class is the image's.
        ratios: [n] float32, or None where there is no confidence: how much nearer the hot pixels
            are to the map's class than to others (log-ratio).
        unrated: why there is no confidence, or None.

    Its ``str`` is a line for each quarter of the images by distance, one for the control, and one
    for the confidence.
    """

    distances: Tensor
    cosine: Tensor
    spearman: Tensor
    flat: int
    unknown: int
    control: Tensor | None = None
    right: Tensor | None = None
    ratios: Tensor | None = None
    unrated: str | None = None

    def __len__(self) -> int:
        return len(self.distances)

    def __str__(self) -> str:
        """Return means by distance, next to those of a random row."""
        lines = []
        for part in self.distances.argsort(stable=True).tensor_split(4):
            if not len(part):
                continue
            low, high = self.distances[part[[0, -1]]].tolist()
            line = (
                f"fidelity at distance {low:.3f} to {high:.3f}: cosine "
                f"{float(self.cosine[part].mean()):.3f}, Spearman "
                f"{float(self.spearman[part].mean()):.3f}"
            )
            if self.control is not None:
                line += f", cosine of a random row {float(self.control[part].mean()):.3f}"
            lines.append(f"{line} ({len(part)} images)")
        if self.control is not None and len(self):
            ours, control = float(self.cosine.mean()), float(self.control.mean())
            lines.append(
                f"fidelity of the nearest row {ours:.3f}, of a random row {control:.3f}: "
                f"{ours - control:+.3f}"
            )
        if self.right is not None and self.ratios is not None and len(self):
            share = float(self.right.float().mean())
            told = "nothing to tell apart"
            if 0 < share < 1:
                told = (
                    f"right from wrong (AUROC): {auroc(self.ratios, self.right):.3f} by the "
                    f"confidence, {auroc(-self.distances, self.right):.3f} by the distance"
                )
            lines.append(f"the map's class is right in {share:.1%}; {told}")
        if self.unrated is not None:
            lines.append(f"no confidence: {self.unrated}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Calibration:
    """Fidelity at a distance, and confidence.

    The expected agreement is linear between knots, never rising, flat beyond them.

    Attributes:
        distances: [Q] float32, rising.
        agreement: [Q] float32, falling.
        images: how many images it was fitted to.
        control: the mean agreement of a random row's map, or None if it was not measured. A
            fidelity that is hardly above it says that any row's map would have agreed as well,
            not that this one is right.
        right: the confidence that a map's class is right, or None.
    """

    distances: Tensor
    agreement: Tensor
    images: int
    control: float | None = None
    right: Confidence | None = None

    @classmethod
    def fit(cls, distances: Tensor, agreement: Tensor) -> Calibration:
        """Fit a falling function to the images, in groups of equal size by distance.

        Groups of at least IMAGES_A_KNOT images, at most MOST_KNOTS of them, give a knot each, at
        their mean distance and mean agreement; adjacent groups whose agreement rises are pooled
        (isotonic regression), so that noise does not make a farther row more trustworthy.

        Args:
            distances: [n] floating point.
            agreement: [n] floating point.

        Raises:
            ValueError: another shape, NaN or infinity, or fewer than IMAGES_A_KNOT images.
        """
        sizes = require_shape("distances", distances, "n")
        require_shape("agreement", agreement, "n", sizes)
        require_finite_rows("distances", distances[:, None])
        require_finite_rows("agreement", agreement[:, None])
        if len(distances) < IMAGES_A_KNOT:
            raise ValueError(
                f"`distances` must be of at least {IMAGES_A_KNOT} images, got {len(distances)}"
            )
        order = distances.argsort(stable=True)
        count = min(MOST_KNOTS, len(order) // IMAGES_A_KNOT)
        groups = [
            (float(distances[part].double().mean()), float(agreement[part].double().mean()), 1)
            for part in order.tensor_split(count)
        ]
        pooled: list[tuple[float, float, int]] = []
        for group in groups:
            pooled.append(group)
            while len(pooled) > 1 and pooled[-2][1] <= pooled[-1][1]:
                (d1, a1, n1), (d2, a2, n2) = pooled[-2:]
                n = n1 + n2
                pooled[-2:] = [((d1 * n1 + d2 * n2) / n, (a1 * n1 + a2 * n2) / n, n)]
        return cls(
            torch.tensor([d for d, _, _ in pooled]),
            torch.tensor([a for _, a, _ in pooled]),
            len(distances),
        )

    def fidelity(self, distances: Tensor) -> Tensor:
        """Return the expected agreement at distances [B] on the knots' device; 0 at infinity."""
        knots, values = self.distances, self.agreement
        above = torch.searchsorted(knots, distances.contiguous()).clamp(max=len(knots) - 1)
        below = (above - 1).clamp(min=0)
        span = knots[above] - knots[below]
        share = (distances - knots[below]) / torch.where(span > 0, span, 1.0)
        mixed = torch.lerp(values[below], values[above], share.clamp(0, 1))
        return torch.where(distances.isinf(), 0.0, mixed)

    def to(self, device: torch.device) -> Calibration:
        """Return the same on a device."""
        return replace(
            self, distances=self.distances.to(device), agreement=self.agreement.to(device)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as the manifest keeps it; :meth:`from_manifest` reads it back."""
        kept: dict[str, Any] = {
            "measure": "cosine",
            "distances": self.distances.tolist(),
            "agreement": self.agreement.tolist(),
            "images": self.images,
        }
        if self.control is not None:
            kept["control"] = self.control
        if self.right is not None:
            kept["right"] = self.right.to_dict()
        return kept

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Calibration | None:
        """Return the calibration that a database's manifest holds, or None.

        Raises:
            DamagedDatabaseError: it is not what :meth:`to_dict` writes.
        """
        kept = manifest.get(CALIBRATION)
        if kept is None:
            return None
        try:
            distances, agreement = (
                [float(v) for v in kept[name]] for name in ("distances", "agreement")
            )
            if len(distances) != len(agreement) or not distances:
                raise ValueError(f"{len(distances)} distances, {len(agreement)} values")
            if distances != sorted(distances) or not all(map(math.isfinite, distances + agreement)):
                raise ValueError("its distances must rise and everything be finite")
            # Manifests from before it was measured have none.
            control = float(kept["control"]) if "control" in kept else None
            if control is not None and not math.isfinite(control):
                raise ValueError("its control must be finite")
            images = int(kept["images"])
            right = Confidence.from_dict(kept["right"]) if "right" in kept else None
            return cls(torch.tensor(distances), torch.tensor(agreement), images, control, right)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedDatabaseError(
                f"the calibration in the manifest is damaged: {error}"
            ) from None


def transfer_fidelity(
    explainer: Explainer, loader: Iterable[Any], *, progress: bool = False
) -> Fidelity:
    """Compare, image by image, the transferred map with the map from the image's own triplets.

    The map that a random row gives is the control; the rows are drawn with the explainer's seed.
    This takes three forward passes over the images.

    Args:
        explainer: with a database.
        loader: labelled images that the database was not built from, as for
            :meth:`gcfast.Explainer.build`.
        progress: as there.

    Returns:
        The agreements, on the CPU, in the loader's order.

    Raises:
        NoDatabaseError, TypeError, ValueError: as :meth:`gcfast.Explainer.explain_labelled`; a
            loader without images of the database's classes.
    """
    database = explainer.database
    if database is not None:
        database.require_labels("calibrating")
    # Only classes that have rows: one that lost them, say to compression, gives no own map.
    numbers = set(database.labels.tolist()) if database is not None else set()
    names = (
        {database.label_name(label) for label in numbers}
        if database is not None and database.class_names
        else set()
    )
    distances: list[Tensor] = []
    cosines: list[Tensor] = []
    ranks: list[Tensor] = []
    controls: list[Tensor] = []
    right: list[Tensor] = []
    ratios: list[Tensor] = []
    unrated = explainer.unrated
    flat = unknown = 0
    real = explainer.settings.objective.real_labels
    found = batches(loader, real_labels=real)
    for batch in tracked(found, "comparing maps", "batches", total=length(loader), show=progress):
        # Any number can be compared with the rows'; a class must be one of theirs.
        known = [real or label in (names or numbers) for label in batch.labels]
        unknown += known.count(False)
        if not any(known):
            continue
        images = on_device(batch.images[torch.tensor(known)], explainer.network)
        labels = [label for label, kept in zip(batch.labels, known, strict=True) if kept]
        try:
            attached = explainer.attach(images=images, rates=unrated is None)
        except ValueError as error:  # the rest of the model takes no pooled activations
            unrated, attached = str(error), explainer.attach()
        out = attached.explain(images, Finish.checked(images), rates=unrated is None)
        why = out.explanation(attached.transfer.labels, None)
        if out.ratios is not None:
            assert database is not None
            names_of = database.class_names
            own_labels = numbers_like(
                database.labels, names_of, labels, len(labels), real_labels=False
            )
            right.append(why.labels[:, 0].cpu() == own_labels)
            ratios.append(out.ratios.cpu())
        own = explainer.explain_labelled(images, labels)
        distances.append(why.distances[:, 0].cpu())
        cosines.append(cosine(why.maps, own).cpu())
        seen = torch.arange(len(images)) + sum(map(len, controls))
        assert database is not None  # or there were no maps
        drawn = random_rows(seen, len(database), explainer.settings.seed)
        controls.append(cosine(_maps_of(drawn, images, explainer.network, database), own).cpu())
        ranks.append(spearman(why.maps, own).cpu())
        flat += int((flat_maps(why.maps) | flat_maps(own)).sum())
    if not distances:
        raise ValueError(
            "`loader` must give images of the database's classes, got "
            + (f"{unknown} of others" if unknown else "none")
        )
    return Fidelity(
        torch.cat(distances),
        torch.cat(cosines),
        torch.cat(ranks),
        flat,
        unknown,
        torch.cat(controls),
        torch.cat(right) if right else None,
        torch.cat(ratios) if ratios else None,
        unrated,
    )


def _maps_of(rows: Tensor, images: Tensor, network: Network, database: Database) -> Tensor:
    """Maps [B, h, w] of images with the weights of given rows [B], or of their classes."""
    # A few rows of possibly many shards: joining the columns would copy them all.
    taken = [database.rows(row, row + 1) for row in rows.tolist()]
    proxies = proxies_of(database, images.device)
    if proxies is not None:
        labels = torch.cat([row.labels for row in taken])
        return proxy_maps(network, proxies, images, labels, Finish.checked(images))
    weights = torch.cat([row.weights for row in taken]).float().to(images.device)
    settings = database.manifest["settings"]
    if settings.get("method") == ELEMENTWISE:
        with network.differentiable(images, finer=True) as captured:
            finish = Finish.checked(images)
            return cotangent_maps(network, captured, weights, settings["l2_normalize"], finish)
    captured = network.embed(images, finer=True)
    return on_images(ops.sparse_cam, captured.share, captured.finer)(
        captured.activations,
        torch.arange(len(rows), device=images.device)[:, None],
        torch.cat([row.channels for row in taken]).to(images.device),
        weights,
        size=(images.shape[2], images.shape[3]),
    )


def calibrated(fidelity: Fidelity) -> Calibration:
    """Fit a calibration to a measured fidelity, by cosine.

    Raises:
        ValueError: too few images, or most of them are in the database.
    """
    same = int((fidelity.distances <= SAME_IMAGE).sum())
    if 2 * same > len(fidelity):
        raise ValueError(
            "`loader` must give images that the database was not built from, got "
            f"{same} of {len(fidelity)} at distance 0 from a row"
        )
    if len(fidelity) < IMAGES_A_KNOT:
        raise ValueError(
            f"`loader` must give at least {IMAGES_A_KNOT} images of the database's classes, "
            f"got {len(fidelity)}"
        )
    fitted = Calibration.fit(fidelity.distances, fidelity.cosine)
    if fidelity.control is not None:
        fitted = replace(fitted, control=float(fidelity.control.mean()))
    if fidelity.right is not None and fidelity.ratios is not None:
        fitted = replace(fitted, right=Confidence.fit(fidelity.ratios, fidelity.right))
    return fitted
