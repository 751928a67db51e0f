"""What the front ends for embeddings share: maps at the layer's resolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import AFFINE_HEADS, CHANNELS, Net, pictures
from torch import nn

import gcfast
from gcfast.adapters._explained import coarse_explainer, explainer_of, layer_maps
from gcfast.errors import ModelMismatchError


def network() -> Net:
    return Net(AFFINE_HEADS["linear"](CHANNELS)).eval()


def test_rows_without_a_scale_are_taken() -> None:
    """A database of embeddings alone: the weights are scaled here."""
    model = network()
    images, labels = pictures(24)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(model(images), dim=1)
    maps = []
    for relative in (True, False):
        explainer = gcfast.Explainer(model, "backbone", channels=5)
        if relative:
            check = (images[:4], range(4))
            explainer.build_from_embeddings(unit, labels, sample=images, check=check)
        else:
            explainer.build([(images, labels)])
        assert explainer.database is not None
        assert explainer.database.relative == relative
        coarse = coarse_explainer(explainer.database, model)
        captured = coarse.network.embed(images[:3] + 0.1)
        why = layer_maps(coarse, captured.activations, captured.output, relu=True, center=0.0)
        maps.append(why.maps)
    assert maps[0].amax() > 0
    torch.testing.assert_close(*maps)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "refine": ("gradcam", {"refine": "auto"}, "`refine` must be left out"),
    "requery": ("gradcam", {"requery": True}, "`requery` must be left out"),
    "elementwise": ("elementwise", {}, "must not be of method='elementwise'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    method, settings, words = REFUSED[name]
    model = network()
    kept = {} if method == "elementwise" else {"channels": 5}
    database = gcfast.Explainer(model, "backbone", method=method, **kept).build([pictures(24)])
    with pytest.raises(ValueError, match=words):
        coarse_explainer(database, model, **settings)


@pytest.mark.parametrize(("own", "given"), [("layer4", "layer4.1"), ("layer4.1", "layer4")])
def test_the_last_module_of_the_layer_is_the_layer(own: str, given: str) -> None:
    """Code for other libraries names ``layer4[-1]``, where a database has ``layer4``."""
    model = nn.Sequential()
    model.add_module("layer4", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    database = gcfast.Explainer(model, own, channels=5).build([pictures(24)])
    for layer in (given, model.get_submodule(given)):
        assert explainer_of(database, model, layer=layer).layer_name == own
    with pytest.raises(ModelMismatchError, match=rf"the layer '{own}', not with 'layer4\.0'"):
        explainer_of(database, model, layer="layer4.0")
