"""The calls of an explainer that take their evidence from the caller, not from a nearest row."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from gcfast.errors import NoDatabaseError
from gcfast.explain.base import ExplainerBase
from gcfast.explain.direct.own_maps import labelled_maps, proxy_maps, triplet_maps
from gcfast.explain.direct.pair import pair_maps
from gcfast.explain.direct.toward import toward_maps
from gcfast.explain.result import MapOptions, PairMaps, TripletMaps
from gcfast.method.labels import numbers_like


class DirectCalls(ExplainerBase):
    """Explain by labels, triplets, pairs and vectors of the embedding space."""

    def explain_labelled(
        self, images: Tensor, labels: Any, **options: Unpack[MapOptions]
    ) -> Tensor:
        """Return maps from the images' own triplets against the database, which transfer estimates.

        With ``method="proxy"`` the proxies of the given labels make them, whatever is nearest.

        Args:
            images: as for :meth:`explain_batch`.
            labels: [B] whole numbers or names, of the database's classes; real numbers for a
                ``RankLoss``.
            **options: as for :meth:`explain_batch`.

        Returns:
            [B, OH, OW] float32; zeros for a label that no row of the database has.

        Raises:
            NoDatabaseError, TypeError, ValueError: as :meth:`explain_batch`, and for labels that
                the database does not know; an objective over the other kind of labels than the
                database has.

        Source: paper, section 3.2 and its Figure 3.
        """
        images = self.network.checked("images", images)
        finish = self._finish(images, options)
        attached = self.attach(finish)
        database = attached.database
        database.require_labels("explain_labelled")
        if attached.proxies is not None:
            names, rows = database.class_names, database.labels
            numbers = numbers_like(rows, names, labels, len(images), real_labels=False)
            return proxy_maps(self.network, attached.proxies, images, numbers, finish)
        return labelled_maps(self.network, self.settings, database, images, labels, finish)

    def explain_triplet(
        self, anchor: Tensor, positive: Tensor, negative: Tensor, **options: Unpack[MapOptions]
    ) -> TripletMaps:
        """Return maps of given triplets: Grad-CAM on the objective itself, no database needed.

        The hinge of a triplet that is solved already has no gradient; it is ignored with
        ``on_no_triplet="hardest"``, and with "skip" the maps of such a triplet are zeros.

        Args:
            anchor: [B, 3, h, w], as for :meth:`explain_batch`.
            positive: [B, 3, h, w], of the anchors' labels.
            negative: [B, 3, h, w], of other labels.
            **options: as for :meth:`explain_batch`; ``center`` other than 0 needs a database.

        Returns:
            Maps of the anchors, positives and negatives, [B, OH, OW] float32 each.

        Raises:
            NoDatabaseError: ``center`` without a database.
            TypeError, ValueError: as :meth:`explain_batch`; ``method="proxy"``.

        Source: paper, section 3.1.
        """
        if self.settings.is_proxy:
            raise ValueError(
                "`method` must be 'gradcam' or 'gradcam++' to explain a triplet, got 'proxy', "
                "which has no gradient: explain_labelled shows what speaks for a class"
            )
        self._check_center(self._finish(torch.empty(0, 3, 1, 1), options))
        return triplet_maps(
            self.network,
            self.settings,
            (anchor, positive, negative),
            self._mean_activation,
            options,
        )

    def explain_toward(
        self, images: Tensor, cotangents: Tensor, **options: Unpack[MapOptions]
    ) -> Tensor:
        """Return maps of what brings images closer to given vectors; no database needed.

        The vectors are pulled back to the layer, as the gradient of f · c is, and averaged over
        space to channel weights: Grad-CAM towards a text, a prototype, another image, a query. The
        setting ``evidence`` has no say: −c shows what keeps an image away. Subtract what all
        vectors of the kind have in common, the mean of a few neutral texts or of all prototypes,
        or the map shows that. One forward pass and one product from the layer on. With
        ``method="elementwise"`` it is gradient times activation, place by place.

        Args:
            images: as for :meth:`explain_batch`.
            cotangents: [D] for all images or [B, D], floating point, on the images' device; of any
                length, which the maps show with ``normalize=None`` alone.
            **options: as for :meth:`explain_batch`; ``center`` other than 0 needs a database.

        Returns:
            [B, OH, OW] float32; zeros where nothing brings an image closer.

        Raises:
            NoDatabaseError: ``center`` without a database.
            TypeError, ValueError: as :meth:`explain_batch`; vectors of another kind, shape or
                device, or not finite.
        """
        images = self.network.checked("images", images)
        finish = self._finish(images, options)
        if self.settings.is_elementwise:
            self._check_center(finish)
        return toward_maps(
            self.network, self.settings, images, cotangents, self._mean_activation, finish
        )

    def explain_pair(
        self,
        query: Tensor,
        match: Tensor,
        *,
        unlike: Tensor | None = None,
        spread_rest: bool | None = None,
        correspondence: bool = False,
        **options: Unpack[MapOptions],
    ) -> PairMaps:
        """Return what makes pairs of images close, on either one; no database needed.

        The cosine of their embeddings, whatever ``l2_normalize`` says, is split over the places of
        each image: with ``normalize=None, relu=False`` and the layer's own resolution as ``size``
        a map sums to it. All channels take part, whatever ``channels`` says. What has no place is
        given as ``.query_rest`` and ``.match_rest``, see
        :class:`gcfast.explain.result.PairMaps`. One forward pass for each image and one product
        from the layer on.

        Args:
            query: [B, 3, h, w], as for :meth:`explain_batch`.
            match: [B, 3, h', w'], of the same B.
            unlike: images [B, 3, h'', w''] to tell them from. The map of the query then shows where
                it is more like the match than like these (parts of the difference of the two
                cosines), and so for the match. Or vectors of the embedding space, [D] or [B, D],
                taken as they are: the mean of a database's embeddings takes out what all images
                share, which is most of many cosines.
            spread_rest: whether what has no place is spread evenly over the maps, as it is over
                ``.query_parts`` and ``.match_parts``. None for raw maps alone (normalize=None),
                which then sum to the cosine; where it is most of the cosine, maps with it have no
                contrast.
            correspondence: also give ``.correspondence``, how much each place of the one has in
                common with each place of the other. It takes one more product from the layer on
                for each place of either image, or D if there are fewer, one after the other.
            **options: as for :meth:`explain_batch`; ``center`` other than 0 needs a database, and
                is subtracted from the maps alone.

        Raises:
            NoDatabaseError: ``center`` without a database.
            UnsupportedModelError: a model that divides its output by its norm where gcfast cannot
                look into it.
            TypeError, ValueError: as :meth:`explain_batch`; different B.

        Source: Stylianou et al., arXiv:1901.00536; Zhu et al., arXiv:1909.12977.
        """
        if not isinstance(correspondence, bool):
            raise TypeError(f"`correspondence` must be a bool, got {correspondence!r}")
        if spread_rest is not None and not isinstance(spread_rest, bool):
            raise TypeError(f"`spread_rest` must be a bool or None, got {spread_rest!r}")
        finish = self._finish(torch.empty(0, 3, 1, 1), options)
        return pair_maps(
            self.network,
            query,
            match,
            unlike,
            self._mean_activation,
            options,
            spread_rest=finish.normalize is None if spread_rest is None else spread_rest,
            correspondence=correspondence,
        )

    def _mean_activation(self) -> Tensor:
        if self._database is None:
            raise NoDatabaseError(
                "`center` must be 0 without a database, whose mean activation it takes: call "
                "build(loader), or gcfast.load"
            )
        return self.attach().database.mean_activation
