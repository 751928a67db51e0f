"""Models that take something else than images, and models that no gradient goes through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from networks import Lambda, Net, common, loader, pictures
from torch import Tensor, nn

import gcfast


class Pairs(nn.Module):
    """Two images at once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = common()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(left) - self.net(right)


class Keyword(nn.Module):
    """Images by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = common()

    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)


class FromDict(nn.Module):
    """Images in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = common()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.net(batch["image"])


class Images(nn.Module):
    """What the how-to on layers shows."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self.model, images)


def built(model: nn.Module, layer: str | None = None) -> gcfast.Explainer:
    explainer = gcfast.Explainer(model.eval(), layer, channels=5)
    explainer.build(loader(*pictures(9)))
    return explainer


@pytest.mark.parametrize(
    ("model", "signature"),
    [(Pairs, r"forward\(left: .*, right: .*\)"), (Keyword, r"forward\(\*, pixel_values: .*\)")],
)
def test_several_inputs_and_keywords_are_refused(model: type[nn.Module], signature: str) -> None:
    with pytest.raises(TypeError, match=f"must take images as its one argument, got {signature}"):
        gcfast.Explainer(model())


def test_a_model_of_dicts_says_how_it_was_called() -> None:
    with pytest.raises(IndexError) as caught:
        built(FromDict())
    assert "gcfast calls a model with images" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Pairs, lambda model, images: model(images, torch.zeros_like(images))),
        (Keyword, lambda model, images: model(pixel_values=images)),
        (FromDict, lambda model, images: model({"image": images})),
    ],
    ids=["pairs", "keyword", "dict"],
)
def test_a_module_around_them_is_explained(
    model: type[nn.Module], call: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    layer = "model.net.backbone@1" if model is Pairs else None
    explainer = built(Images(model(), call), layer)
    assert explainer.layer_name == (layer or "model.net.backbone")
    assert explainer.explain_batch(pictures(3)[0]).amax() > 0


def test_batches_that_are_dicts() -> None:
    images, labels = pictures(6)
    with pytest.raises(ValueError, match="got a dict with 'pixel_values', 'labels' as batch 0"):
        gcfast.Explainer(common()).build([{"pixel_values": images, "labels": labels}])


def quantized() -> nn.Module:
    """The linear layer of the head in int8."""
    model = Net(nn.Sequential(Lambda(lambda maps: maps.mean((2, 3))), nn.Linear(12, 6))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.skipif("none" in torch.backends.quantized.supported_engines[:1], reason="no engine")
@pytest.mark.filterwarnings("ignore:quantized")
@pytest.mark.parametrize("layer", [None, "backbone"])
def test_quantized_models_are_called_so(layer: str | None) -> None:
    with pytest.raises(ValueError, match="modules of the model are quantized, and integers have"):
        built(quantized(), layer)


def test_a_layer_of_integers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        Lambda(lambda maps: (9 * maps).int()),
        Lambda(lambda maps: maps.float().mean((2, 3))),
    )
    with pytest.raises(TypeError, match="`layer` must give floating point, got '1' with int32"):
        built(model, "1")


def test_a_graph_of_torch_export() -> None:
    model, images = common().eval(), pictures(4)[0]
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    with pytest.raises(gcfast.UnsupportedModelError, match=r"as torch\.export makes"):
        gcfast.Explainer(program.module())


def test_flipped_features_that_are_added() -> None:
    """Two runs of every layer: one is explained where it is named."""

    def both(model: nn.Module, images: Tensor) -> Tensor:
        return model(images) + model(images.flip(3))

    with pytest.raises(ValueError, match="the image reaches the embedding past the last ones") as e:
        built(Images(common(), both))
    assert "tokens" not in str(e.value)
    assert "'model.backbone@2' [1, 12, 4, 4]" in str(e.value)
    assert built(Images(common(), both), "model.backbone@2").explain_batch(pictures(2)[0]).any()


def test_a_model_that_detaches_its_output() -> None:
    model = Images(common(), lambda model, images: model(images).detach())
    with pytest.raises(ValueError, match=r"must be on the way .* \(or the model detaches it\)"):
        built(model)
