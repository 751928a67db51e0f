"""The front ends beside the libraries whose calls they answer: classes, memory, and similarity.

    python bench/front_ends.py [--network resnet18 resnet50] [--batch 1 16] [--json FILE]
    python bench/front_ends.py --similarity [--json FILE]

Classifiers of torchvision with random weights, 224 x 224, NCHW images for everyone, the target a
class. The peaks are of a process of their own for each side: how much the resident memory grows
over its first batch, what the libraries set up once included, as in the forward pass.
``--similarity``: Spearman's correlation of Grad-CAM of the cosine with xaitk-saliency's sliding
windows, on pairs of drawn birds. What the libraries need beside a CPU-only torch is in
bench/peers.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from memory import resident_mib
from paired import conditions, paired
from subjects import images
from torch import Tensor, nn
from torchvision_on_cpu import make_torchvision_importable

import gcfast

Explain = Callable[[Tensor], Any]
CLASS = 3
LAYERS = {
    "resnet18": "layer4",
    "resnet50": "layer4",
    "efficientnet_b0": "features",
    "vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
}


def classifier(name: str) -> tuple[nn.Module, nn.Module]:
    """(a network of torchvision in evaluation mode, the layer that is explained)."""
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).eval()
    if name.startswith("vit"):  # whose head is zero
        nn.init.normal_(model.heads.head.weight)
    return model, model.get_submodule(LAYERS[name])


def patches(tokens: Tensor) -> Tensor:
    """The patch tokens of 224 x 224 images as [B, C, H, W]."""
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 14, 14)


def pytorch_grad_cam_call(package: Any, name: str) -> Explain:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer = classifier(name)
    reshape = patches if name.startswith("vit") else None
    cam = package.GradCAM(model, [layer], reshape_transform=reshape)
    return lambda batch: cam(batch, [ClassifierOutputTarget(CLASS)] * len(batch))


def pytorch_grad_cam_peer(name: str) -> Explain:
    import pytorch_grad_cam

    return pytorch_grad_cam_call(pytorch_grad_cam, name)


def pytorch_grad_cam_adapter(name: str) -> Explain:
    import gcfast.adapters.pytorch_grad_cam as adapter

    return pytorch_grad_cam_call(adapter, name)


def own(name: str) -> Explain:
    model, layer = classifier(name)
    cam = gcfast.GradCAM(model, layer, reshape=patches if name.startswith("vit") else None)
    return lambda batch: cam(batch, CLASS)


def captum_call(package: Any, name: str) -> Explain:
    extractor = package.LayerGradCam(*classifier(name))
    return lambda batch: extractor.attribute(batch, CLASS)


def captum_peer(name: str) -> Explain:
    import captum.attr

    return captum_call(captum.attr, name)


def captum_adapter(name: str) -> Explain:
    import gcfast.adapters.captum as adapter

    return captum_call(adapter, name)


def forward(name: str) -> Explain:
    model, _ = classifier(name)

    def run(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(batch)

    return run


SIDES: dict[str, Callable[[str], Explain]] = {
    "forward pass": forward,
    "gcfast.GradCAM": own,
    "pytorch-grad-cam": pytorch_grad_cam_peer,
    "its front end": pytorch_grad_cam_adapter,
    "captum": captum_peer,
    "captum's front end": captum_adapter,
}
PAIRS = (
    ("pytorch-grad-cam", "its front end"),
    ("pytorch-grad-cam", "gcfast.GradCAM"),
    ("captum", "captum's front end"),
    ("gcfast.GradCAM", "forward pass"),
)


def peak_mib(side: str, name: str, count: int) -> float:
    """Growth of resident memory over one call, at its peak, in this process."""
    run, batch = SIDES[side](name), images(count)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident_mib()
    run(batch)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 - before


def in_a_process(side: str, name: str, count: int) -> float:
    command = [sys.executable, __file__, "--peak", side, name, str(count)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout.split()[-1])


def similarity(pairs: int) -> dict[str, list[float]]:
    """Spearman's correlation of the two methods' maps, for pairs of birds of one species."""
    from scipy.stats import spearmanr
    from xaitk_saliency.impls.gen_image_similarity_blackbox_sal.sbsm import SBSMStack

    from gcfast.adapters.xaitk import GradCAMSimilarity, TorchDescriptor
    from gcfast.demo.birds import draw_bird
    from gcfast.demo.network import load_network

    blackbox = TorchDescriptor(load_network())
    windows = SBSMStack(window_size=(32, 32), stride=(8, 8))
    found = []
    for label in range(pairs):
        first, second = (draw_bird(label, seed=1, index=i).image for i in range(2))
        ours = GradCAMSimilarity()(first, [second], blackbox)
        theirs = windows(first, [second], blackbox)
        found.append(float(spearmanr(ours.ravel(), theirs.ravel()).statistic))
        print(f"  pair {label}: {found[-1]:.3f}", flush=True)
    return {"spearman": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7, help="0: only the peaks")
    parser.add_argument("--similarity", type=int, nargs="?", const=12, help="pairs of birds")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # of one side, in this process
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    make_torchvision_importable()

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    if arguments.peak:
        side, name, count = arguments.peak
        print(peak_mib(side, name, int(count)))
        return
    record: dict[str, Any] = {"conditions": conditions()}
    print(record)
    if arguments.similarity:
        record |= similarity(arguments.similarity)
        arguments.network = []
    for package in ("grad-cam", "captum"):
        record[package] = metadata.version(package)
    for name in arguments.network:
        sides = {
            side: make(name)
            for side, make in SIDES.items()
            if name[:3] != "vit" or side[:6] != "captum"
        }
        record[name] = {}
        for count in arguments.batch:
            batch = images(count, seed=9)
            results: dict[str, Any] = {}
            record[name][f"B = {count}"] = results
            for a, b in PAIRS if arguments.rounds else ():
                if a in sides:
                    timing = paired(
                        lambda run=sides[a], x=batch: run(x),
                        lambda run=sides[b], x=batch: run(x),
                        rounds=arguments.rounds,
                        warmup=1,
                    )
                    print(f"{name}, B = {count}: {a} / {b}: {timing}", flush=True)
                    results[f"{a} / {b}"] = timing.record()
                    save()
            results["peak_mib"] = {side: in_a_process(side, name, count) for side in sides}
            print(f"{name}, B = {count}: MiB: {results['peak_mib']}", flush=True)
            save()
    save()


if __name__ == "__main__":
    main()
