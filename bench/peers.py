"""explain_batch beside torch-cam, captum and pytorch-grad-cam, end to end on the same batch.

    pip install --no-deps torchvision torchcam==0.5.0 captum==0.9.0 grad-cam==1.5.7 ttach \
        opencv-python-headless
    python bench/peers.py [--network resnet50] [--json FILE]

None of the three explains an embedding by itself, so each gets what its users give it: a target
that is the cosine between the image's embedding and one other embedding, fixed beforehand (a second
image they need at explain time; its forward pass is not charged to them). All return maps at image
size: torch-cam and captum stop at the layer's size, and are given the same bilinear upsampling.
torch-cam and pytorch-grad-cam import torchvision, which cannot be imported beside a CPU-only torch;
there they get stand-ins for the operators that torchvision fails to find (no peer calls them).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import conditions, paired
from subjects import CONVOLUTIONAL, explainer_with_rows, images, network
from torch import Tensor, nn
from torchvision_on_cpu import make_torchvision_importable

Explain = Callable[[Tensor], Tensor]


class CosineScore(nn.Module):
    """Images → [B, 1]: the cosine to a fixed embedding, as a one-class score."""

    other: Tensor

    def __init__(self, model: nn.Module, other: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("other", F.normalize(other, dim=1))

    def forward(self, batch: Tensor) -> Tensor:
        return (F.normalize(self.model(batch), dim=1) * self.other).sum(1, keepdim=True)


def upsampled(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps [B, h, w] → [B, H, W], finished as explain_batch finishes its own."""
    maps = maps.detach().clamp(min=0)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def torchcam_peer(score: nn.Module, layer: nn.Module) -> Explain:
    from torchcam.methods import GradCAM

    extractor = GradCAM(score, layer)

    def explain(batch: Tensor) -> Tensor:
        scores = score(batch)
        return upsampled(extractor(class_idx=0, scores=scores)[0], batch.shape[-2:])

    return explain


def captum_peer(score: nn.Module, layer: nn.Module) -> Explain:
    from captum.attr import LayerGradCam

    extractor = LayerGradCam(score, layer)

    def explain(batch: Tensor) -> Tensor:
        maps = extractor.attribute(batch, target=0, relu_attributions=True)
        return upsampled(maps[:, 0], batch.shape[-2:])

    return explain


def grad_cam_peer(score: nn.Module, layer: nn.Module) -> Explain:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    extractor = GradCAM(model=score, target_layers=[layer])

    def explain(batch: Tensor) -> Tensor:
        targets = [ClassifierOutputTarget(0)] * len(batch)
        return torch.from_numpy(extractor(input_tensor=batch, targets=targets))

    return explain


PEERS = {
    "torch-cam": ("torchcam", torchcam_peer),
    "captum": ("captum", captum_peer),
    "pytorch-grad-cam": ("grad-cam", grad_cam_peer),
}


def layer_module(name: str, model: nn.Module, path: str) -> nn.Module:
    """The layer whose output is a plain tensor, as the peers need it."""
    return model.get_submodule("backbone.encoder.stages.3" if name == "resnet50" else path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=CONVOLUTIONAL, choices=CONVOLUTIONAL)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="give every side the batch in channels-last, which the peers' users rarely do",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    make_torchvision_importable()
    record: dict[str, object] = {"conditions": conditions(), "batch": arguments.batch}
    record["channels_last"] = arguments.channels_last
    print(record)
    for name in arguments.network:
        model, path = network(name)
        explainer = explainer_with_rows(model, path, 10_000)
        batch = images(arguments.batch, seed=9)
        if arguments.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            other = model(images(1, seed=10))
        results = {}
        forward = paired(
            lambda e=explainer, x=batch: e.explain_batch(x),
            lambda m=model, x=batch: _forward(m, x),
            rounds=arguments.rounds,
        )
        print(f"{name}, B = {arguments.batch}: explain_batch / forward pass: {forward}")
        results["forward"] = forward.record()
        for peer, (package, make) in PEERS.items():
            explain = make(CosineScore(model, other), layer_module(name, model, path))
            maps = explain(batch)
            assert maps.shape == (len(batch), *batch.shape[-2:]), maps.shape
            timing = paired(
                lambda run=explain, x=batch: run(x),
                lambda e=explainer, x=batch: e.explain_batch(x),
                rounds=arguments.rounds,
            )
            from importlib.metadata import version

            print(f"  {peer} {version(package)} / explain_batch: {timing}")
            results[peer] = {"version": version(package), **timing.record()}
        record[name] = results
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _forward(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(batch)


if __name__ == "__main__":
    main()
