"""What the front ends for embeddings share: an Explainer, and maps at the layer's resolution."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import Database, Explainer, Explanation, ops
from gcfast._checks import require_finite_rows
from gcfast.explain.default import stored_explainer
from gcfast.explain.maps import explained
from gcfast.explain.result import Finish
from gcfast.method.head import normalized
from gcfast.ops.precision import full_precision


def explainer_of(
    database: Database | str | os.PathLike[str], model: nn.Module, **settings: Any
) -> Explainer:
    """Return the Explainer of an open database or of its path, with the stored settings.

    Of a ``layer`` that ends the database's, or is ended by it, the output is the same: examples of
    other libraries name ``layer4[-1]`` where a database has ``layer4``.

    Raises:
        TypeError, ValueError, GcfastError: as :func:`gcfast.load`.
    """
    if isinstance(database, str | os.PathLike):
        database = Database.open(database)
    if not isinstance(database, Database):
        raise TypeError(
            f"`database` must be a gcfast.Database or a path, got {type(database).__name__}"
        )
    # What is no module is refused further on.
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    given, own = settings.get("layer"), modules.get(database.manifest["layer"])
    given = modules.get(given) if isinstance(given, str) else given
    if given is not None and own is not None and _last(given) is _last(own):
        settings["layer"] = None
    return stored_explainer(database, model, **settings)


def _last(module: nn.Module) -> nn.Module:
    """Return what gives a module's output: of a sequence its last module."""
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


def coarse_explainer(
    database: Database | str | os.PathLike[str], model: nn.Module, **settings: Any
) -> Explainer:
    """Return the Explainer for :func:`layer_maps`; arguments as for :func:`explainer_of`.

    Raises:
        TypeError, ValueError, GcfastError: as there; settings that go beyond the layer's resolution
            and one forward pass.
    """
    explainer = explainer_of(database, model, **settings)
    for name in ("refine", "requery"):
        if settings.get(name):
            raise ValueError(
                f"`{name}` must be left out here, where maps have the layer's own resolution and "
                f"rest on one forward pass, got {settings[name]!r}: explain_batch takes it"
            )
    if explainer.settings.is_elementwise:
        raise ValueError(
            "`database` must not be of method='elementwise', whose maps need a backward pass: "
            "gcfast.Explainer and the front end of pytorch-grad-cam make them"
        )
    return explainer


def layer_maps(
    explainer: Explainer, activations: Tensor, output: Tensor, *, relu: bool, center: float
) -> Explanation:
    """Make maps at the layer's own resolution from what a forward pass gave, not normalized.

    The weights of an image are scaled so that the largest is 1: they are as small as the gradients
    of the loss, and an epsilon of the peers would show. Class proxies are as they are.

    Args:
        explainer: with a database.
        activations: [B, C, H, W].
        output: [B, D], the model's own.
        relu: keep what is positive.
        center: as in :class:`gcfast.explain.result.MapOptions`.

    Raises:
        ValueError: NaN or infinity in the output, with the row (on a CUDA device the map is NaN).
    """
    finish = Finish.checked(
        activations, size=None, normalize=None, relu=relu, center=center
    )  # the size is that of the activations
    # Rows without a scale will do, since weights are scaled here.
    attached = explainer.attach(finish._replace(normalize="max"))
    with torch.no_grad(), full_precision(activations.device):
        embeddings = normalized(output, explainer.settings.l2_normalize)
        if not embeddings.is_cuda:
            require_finite_rows("output", embeddings)
        found = attached.transfer(embeddings)
        cam: Any = ops.sparse_cam if attached.proxies is None else ops.dense_cam
        out = explained(
            activations,
            embeddings,
            found,
            finish,
            cam=cam,
            marks=embeddings.is_cuda,
            proxies=attached.proxies,
        )
        if attached.proxies is None:
            largest = found.weights[found.rows.clamp(min=0)].float().abs().amax((1, 2))
            scale = torch.where(largest > 0, largest, 1.0)
            out = out._replace(maps=out.maps / scale[:, None, None])
        explanation = attached.result(out, True)
    assert isinstance(explanation, Explanation)
    return explanation
