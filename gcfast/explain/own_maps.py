"""The methods of an explainer that make maps from the images' own triplets."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.builder.rows import signed_parts
from gcfast.explain.explainer_state import ExplainerState
from gcfast.explain.result import MapOptions, Size, TripletMaps
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.labels import numbers_like
from gcfast.method.objectives import gradients_of
from gcfast.method.pairs import Anchors, Cotangents, PairSource
from gcfast.model.capture import Captured


class OwnMaps(ExplainerState):
    """``explain_labelled`` and ``explain_triplet`` of :class:`gcfast.Explainer`."""

    def explain_labelled(
        self,
        images: Tensor,
        labels: Any,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
    ) -> Tensor:
        """Heat maps from the images' own triplets against the database: what transfer approximates.

        Args:
            images: as for :meth:`explain_batch`.
            labels: [B] whole numbers or names, of the database's classes; real numbers for a
                ``RankLoss``.
            size: as for :meth:`explain_batch`.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`.

        Returns:
            [B, OH, OW] float32; zeros for a label that no row of the database has.

        Raises:
            NoDatabaseError, TypeError, ValueError: as :meth:`explain_batch`, and for labels that
                the database does not know; an objective over the other kind of labels than the
                database has.

        Source: paper, section 3.2 and its Figure 3.
        """
        options = MapOptions(size, normalize, relu, center)
        images = self._checked_images("images", images)
        output_size = options.checked(images)
        database = self._attach().database
        numbers = numbers_like(
            database.labels,
            database.class_names,
            labels,
            len(images),
            real_labels=self.settings.objective.real_labels,
        )
        if len(images) == 0:
            return images.new_zeros((0, *output_size), dtype=torch.float32)
        source = PairSource(
            self.settings.objective,
            database.embeddings.float(),
            database.labels,
            hardest=self.settings.on_no_triplet == "hardest",
        )
        with self.network.differentiable(images) as captured:
            embeddings = normalized(captured.output, self.settings.l2_normalize)
            check_embeddings(embeddings.detach(), images)
            anchors = Anchors(
                embeddings.detach().cpu(),
                numbers,
                # None of the rows, and the same for all, so that no draw depends on the batch.
                torch.full((len(images),), len(database)),
            )
            parts = (
                part._replace(
                    values=part.values.to(images.device), valid=part.valid.to(images.device)
                )
                for part in signed_parts(source, anchors, self.settings)
            )
            weights = vjp_grad_weights(
                captured, embeddings, parts, self.settings.method, self.network
            )
        return self._own_maps(captured, weights, options, output_size)

    def explain_triplet(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        *,
        size: Size | None = None,
        normalize: str | None = "max",
        relu: bool = True,
        center: float = 0.0,
    ) -> TripletMaps:
        """Heat maps of given triplets: Grad-CAM on the objective itself, no database needed.

        The hinge of a triplet that is solved already has no gradient; it is ignored with
        ``on_no_triplet="hardest"``, and with "skip" the maps of such a triplet are zeros.

        Args:
            anchor: [B, 3, h, w], as for :meth:`explain_batch`.
            positive: [B, 3, h, w], of the anchors' labels.
            negative: [B, 3, h, w], of other labels.
            size: as for :meth:`explain_batch`.
            normalize: as for :meth:`explain_batch`.
            relu: as for :meth:`explain_batch`.
            center: as for :meth:`explain_batch`; above 0 it needs a database.

        Returns:
            Maps of the anchors, positives and negatives, [B, OH, OW] float32 each.

        Raises:
            NoDatabaseError: ``center`` without a database.
            TypeError, ValueError: as :meth:`explain_batch`.

        Source: paper, section 3.1.
        """
        options = MapOptions(size, normalize, relu, center)
        images = [
            self._checked_images(name, value)
            for name, value in (("anchor", anchor), ("positive", positive), ("negative", negative))
        ]
        if len({len(i) for i in images}) > 1:
            raise ValueError(
                "`anchor`, `positive` and `negative` must have the same B, got "
                + ", ".join(str(len(i)) for i in images)
            )
        sizes = [options.checked(i) for i in images]
        if len(anchor) == 0:
            return TripletMaps(
                *(
                    i.new_zeros((0, *s), dtype=torch.float32)
                    for i, s in zip(images, sizes, strict=True)
                )
            )
        settings = self.settings
        with ExitStack() as stack:
            captured = [stack.enter_context(self.network.differentiable(i)) for i in images]
            embeddings = [normalized(c.output, settings.l2_normalize) for c in captured]
            for values, given in zip(embeddings, images, strict=True):
                check_embeddings(values.detach(), given)
            with torch.enable_grad():
                leaves = [values.detach().requires_grad_() for values in embeddings]
                loss = settings.objective.loss(
                    leaves[0], leaves[1], leaves[2], settings.on_no_triplet == "skip"
                )
                cotangents = gradients_of(loss, leaves)
            maps = []
            for one, own, cotangent, output_size in zip(
                captured, embeddings, cotangents, sizes, strict=True
            ):
                valid = cotangent.new_ones((len(cotangent), 1), dtype=torch.bool)
                part = Cotangents(settings.sign * cotangent[:, None], valid, valid[:, 0].long())
                weights = vjp_grad_weights(one, own, [part], settings.method, self.network)
                maps.append(self._own_maps(one, weights, options, output_size))
        return TripletMaps(*maps)

    def _own_maps(
        self, captured: Captured, weights: Tensor, options: MapOptions, size: tuple[int, int]
    ) -> Tensor:
        """Maps from weights [B, C] of the images themselves."""
        B, C = weights.shape
        m = C if self.settings.channels == "all" else self.settings.channels
        if m > C:
            raise ValueError(f"`channels` must be at most the layer's C = {C}, got {m}")
        channels, kept = ops.top_m(weights, m)
        offsets = None
        if options.center != 0:
            mean = self._attach().database.mean_activation.to(kept.device)
            offsets = (kept * mean[channels]).sum(1)
        return ops.sparse_cam(
            captured.activations.detach(),
            torch.arange(B, device=kept.device)[:, None],
            channels,
            kept,
            size=size,
            offsets=offsets,
            center=options.center,
            relu=options.relu,
            normalize=options.normalize,
        )
