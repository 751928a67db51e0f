"""Maps from the images' own triplets, which transferred maps approximate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gcfast import ops
from gcfast.builder.loader import check_embeddings
from gcfast.builder.rows import signed_parts
from gcfast.database.database import Database
from gcfast.explain.maps import elementwise_maps, on_images
from gcfast.explain.result import Finish, MapOptions, TripletMaps
from gcfast.method.elementwise import gradients_at_layer
from gcfast.method.head import normalized, vjp_grad_weights
from gcfast.method.labels import numbers_like
from gcfast.method.objectives import gradients_of
from gcfast.method.pairs import Cotangents, PairSource
from gcfast.method.partners import Anchors
from gcfast.method.proxies import Proxies, proxy_weights
from gcfast.method.settings import Settings
from gcfast.model.capture import Captured
from gcfast.model.network import Network
from gcfast.ops.precision import full_precision


def labelled_maps(
    network: Network,
    settings: Settings,
    database: Database,
    images: Tensor,
    labels: Any,
    finish: Finish,
) -> Tensor:
    """Make maps from the images' triplets against the database.

    Args:
        network: the model.
        settings: of the explainer.
        database: where positives and negatives come from.
        images: [B, 3, h, w], checked.
        labels: [B], see :meth:`gcfast.Explainer.explain_labelled`.
        finish: how the maps are finished.

    Returns:
        [B, OH, OW] float32.

    Raises:
        TypeError, ValueError: labels that the database does not know, or of another kind.
    """
    numbers = numbers_like(
        database.labels,
        database.class_names,
        labels,
        len(images),
        real_labels=settings.objective.real_labels,
    )
    if len(images) == 0:
        return images.new_zeros((0, *finish.size), dtype=torch.float32)
    source = PairSource(
        settings.objective,
        database.embeddings.float(),
        database.labels,
        hardest=settings.on_no_triplet == "hardest",
    )
    with network.differentiable(images, finer=True) as captured:
        embeddings = normalized(captured.output, settings.l2_normalize)
        check_embeddings(embeddings.detach(), images)
        anchors = Anchors(
            embeddings.detach().cpu(),
            numbers,
            # No image is a row, and all have one number, so that no draw depends on the batch.
            torch.full((len(images),), len(database)),
        )
        parts = (part.to(images.device) for part in signed_parts(source, anchors, settings))
        if settings.is_elementwise:
            (part,) = parts
            lent = torch.where(part.valid, part.values[:, 0], 0.0)
            return cotangent_maps(network, captured, lent, settings.l2_normalize, finish)
        weights = vjp_grad_weights(captured, embeddings, parts, settings.method, network)
    return weighted_maps(
        captured, weights, settings, finish, database.mean_activation if finish.center else None
    )


def cotangent_maps(
    network: Network, captured: Captured, cotangents: Tensor, l2_normalize: bool, finish: Finish
) -> Tensor:
    """Make maps of gradient times activation.

    Args:
        network: the model.
        captured: of :meth:`Network.differentiable`.
        cotangents: [B, D] on the embeddings.
        l2_normalize: whether the embedding is normalized after the model.
        finish: how the maps are finished.

    Returns:
        [B, OH, OW] float32.
    """
    gradients = gradients_at_layer(network, captured, cotangents, l2_normalize)
    cam = on_images(ops.dense_cam, captured.share, captured.finer)
    with torch.no_grad():
        return elementwise_maps(captured.activations, gradients, finish, cam)


def proxy_maps(
    network: Network, proxies: Proxies, images: Tensor, labels: Tensor, finish: Finish
) -> Tensor:
    """Make maps from the proxies of given classes.

    Args:
        network: the model.
        proxies: of the database, on the images' device.
        images: [B, 3, h, w], checked.
        labels: [B] int64, their classes; one that has no proxy gives zeros.
        finish: how the maps are finished.

    Returns:
        [B, OH, OW] float32.

    Raises:
        ValueError: NaN or infinity in the images or their embeddings, with the row.
    """
    if len(images) == 0:
        return images.new_zeros((0, *finish.size), dtype=torch.float32)
    captured = network.embed(images, finer=True)
    check_embeddings(captured.output, images)
    with torch.no_grad(), full_precision(images.device):
        places = proxies.places(labels.to(images.device))
        weights = proxy_weights(captured.activations, proxies.vectors[places])
        return on_images(ops.dense_cam, captured.share, captured.finer)(
            captured.activations, weights, **finish.of_dense()
        )


def triplet_maps(
    network: Network,
    settings: Settings,
    triplet: tuple[Tensor, Tensor, Tensor],
    mean_activation: Callable[[], Tensor],
    options: MapOptions,
) -> TripletMaps:
    """Make the maps of given triplets.

    Args:
        network: the model.
        settings: of the explainer.
        triplet: the anchors, positives and negatives, each [B, 3, h, w].
        mean_activation: gives [C], which ``center`` needs.
        options: of the maps.

    Raises:
        TypeError, ValueError: images that the model does not take, different B, or options out of
            range.
    """
    images = [
        network.checked(name, value)
        for name, value in zip(TripletMaps._fields, triplet, strict=True)
    ]
    if len({len(i) for i in images}) > 1:
        raise ValueError(
            "`anchor`, `positive` and `negative` must have the same B, got "
            + ", ".join(str(len(i)) for i in images)
        )
    finishes = [Finish.checked(i, **options) for i in images]
    mean = mean_activation() if finishes[0].center != 0 else None
    if len(images[0]) == 0:
        return TripletMaps(
            *(
                i.new_zeros((0, *finish.size), dtype=torch.float32)
                for i, finish in zip(images, finishes, strict=True)
            )
        )
    with ExitStack() as stack:
        captured = [stack.enter_context(network.differentiable(i, finer=True)) for i in images]
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
        for one, own, cotangent, finish in zip(
            captured, embeddings, cotangents, finishes, strict=True
        ):
            cotangent = settings.sign * cotangent
            if settings.is_elementwise:
                maps.append(cotangent_maps(network, one, cotangent, settings.l2_normalize, finish))
                continue
            parts = [Cotangents.one_each(cotangent)]
            weights = vjp_grad_weights(one, own, parts, settings.method, network)
            maps.append(weighted_maps(one, weights, settings, finish, mean))
    return TripletMaps(*maps)


def weighted_maps(
    captured: Captured,
    weights: Tensor,
    settings: Settings,
    finish: Finish,
    mean_activation: Tensor | None,
) -> Tensor:
    """Maps from weights [B, C] of the images themselves."""
    B, C = weights.shape
    m = C if settings.channels == "all" or settings.is_proxy else settings.channels
    if m > C:
        raise ValueError(f"`channels` must be at most the layer's C = {C}, got {m}")
    channels, kept = ops.top_m(weights, m)
    offsets = None
    if finish.center != 0:
        assert mean_activation is not None
        offsets = (kept * mean_activation.to(kept.device)[channels]).sum(1)
    return on_images(ops.sparse_cam, captured.share, captured.finer)(
        captured.activations.detach(),
        torch.arange(B, device=kept.device)[:, None],
        channels,
        kept,
        offsets=offsets,
        **finish._asdict(),
    )
