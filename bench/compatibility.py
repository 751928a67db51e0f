"""Which networks gcfast explains by default, and whether its maps equal plain autograd.

    python bench/compatibility.py [--only NAME …] [--out FOLDER]

Every network is built from its real class with random weights. The default layer is found as
:func:`gcfast.layers` does; then one triplet is explained by ``Explainer.explain_triplet`` and,
independently, by a hook on the layer, one backward pass and the formula written out below. The
table goes to docs/compatibility.md, the figures to bench/results/compatibility.json.

timm, transformers and lightning have to be installed, and what is not is named at the end; a
torchvision that does not fit this PyTorch is made importable, as they import it and need none of
its compiled operations here. The files are written after every network, and rows of an
earlier run stay, so that the table can be made in pieces.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import make_torchvision_importable
from torch import Tensor, nn

import gcfast

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of maps in [-1, 1]
FLAT_IMAGES = 8
CHANNELS = 10  # kept, of layers that may have few


class Subject(NamedTuple):
    """A network to be explained."""

    group: str
    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, int] = (224, 224)
    output_key: str | None = None


class Head(nn.Module):
    """A small backbone and a head that people train for re-identification or search."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        )
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class GeM(nn.Module):
    """Generalized mean pooling (Radenović et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, maps: Tensor) -> Tensor:
        return maps.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Stripes(nn.Module):
    """Part-based convolutional baseline: six horizontal stripes (Sun et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((6, 1))
        self.parts = nn.ModuleList(nn.Linear(32, 8) for _ in range(6))

    def forward(self, maps: Tensor) -> Tensor:
        pooled = self.pool(maps)[..., 0]
        return torch.cat([part(pooled[:, :, i]) for i, part in enumerate(self.parts)], 1)


class Siamese(nn.Module):
    """A wrapper whose forward pass takes one image and has two branches of one backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        out = self.backbone(left)
        return out if right is None else out - self.backbone(right)


def average() -> nn.Module:
    """Average pooling and a linear layer, as the paper's networks."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16))


def own_subjects() -> list[Subject]:
    """Heads and wrappers on a small backbone."""
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 16))
    mlp = nn.Sequential(GeM(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    arcface = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32 * 32, 16), nn.BatchNorm1d(16))
    neck = nn.Sequential(average(), nn.BatchNorm1d(16))
    size = (128, 128)
    heads = {
        "average + linear": average(), "BN neck": neck, "GeM + MLP": mlp, "PCB stripes": Stripes(),
        "flatten": flat, "ArcFace (flatten, linear, BN)": arcface,
        "max": nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 16)),
    }  # fmt: skip
    wrappers: dict[str, Callable[[nn.Module], Any]] = {
        "siamese": Siamese,
        "DataParallel": nn.DataParallel,
        "torch.compile": lambda model: torch.compile(model, backend="eager"),
        "FX": torch.fx.symbolic_trace,
    }
    found = [
        Subject("heads", name, functools.partial(Head, head), size) for name, head in heads.items()
    ]
    for name, wrap in wrappers.items():
        found.append(Subject("wrappers", name, functools.partial(wrap, Head(average())), size))
    return found


def lightning_subjects() -> list[Subject]:
    """A module of PyTorch Lightning round a backbone."""
    import lightning.pytorch as lightning

    class Lightning(lightning.LightningModule):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> Tensor:
            return self.backbone(images)

    make = functools.partial(Lightning, Head(average()))
    return [Subject("wrappers", "LightningModule", make, (128, 128))]


def timm_subjects() -> list[Subject]:
    """Networks of timm."""
    import timm

    def of(name: str, side: int = 224, height: int | None = None, **settings: Any) -> Subject:
        shown = name + "".join(f", {k}={v}" for k, v in settings.items() if k != "img_size")
        shown += f", {height} x {side}" if height else ""
        make = lambda: timm.create_model(name, num_classes=0, **settings)  # noqa: E731
        return Subject("timm", shown, make, (height or side, side))

    return [
        of("resnet18"), of("resnet50"), of("resnetv2_50"), of("regnety_002"), of("densenet121"),
        of("vgg11"), of("inception_v3", 299), of("efficientnet_b0"), of("mobilenetv3_small_100"),
        of("convnext_atto"), of("convnextv2_atto"), of("hgnet_tiny"), of("repvit_m0_9"),
        of("nfnet_f0", 192), of("mambaout_femto"), of("poolformer_s12"), of("mobilevit_xxs", 256),
        of("edgenext_xx_small", 256), of("fastvit_t8", 256),
        of("vit_tiny_patch16_224"), of("vit_tiny_patch16_224", global_pool="avg"),
        of("vit_tiny_patch16_224", 256, 128, img_size=(128, 256)),
        of("deit_tiny_distilled_patch16_224"), of("eva02_tiny_patch14_224"),
        of("vit_small_patch14_dinov2", img_size=224, depth=3),
        of("vit_small_patch14_reg4_dinov2", img_size=224, depth=3),
        of("vit_base_patch16_siglip_224", depth=2), of("beit_base_patch16_224", depth=2),
        of("swin_tiny_patch4_window7_224"), of("swinv2_tiny_window8_256", 256),
        of("maxvit_tiny_rw_224"), of("coatnet_nano_rw_224"), of("mixer_s16_224"),
        of("convit_tiny"), of("cait_xxs24_224", depth=4), of("xcit_nano_12_p16_224", depth=4),
        of("pvt_v2_b0"), of("focalnet_tiny_srf"), of("davit_tiny"), of("gcvit_xxtiny"),
        of("levit_128s"), of("crossvit_tiny_240", 240),
    ]  # fmt: skip


def transformers_subjects() -> list[Subject]:
    """Networks of transformers, small ones of each class."""
    import transformers

    small: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    wide = {**small, "intermediate_size": 128}
    dino = {**small, "image_size": 224, "patch_size": 14}
    clip = {**wide, "patch_size": 16}
    stages: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 128], "depths": [1] * 4}
    swin: dict[str, Any] = {"embed_dim": 24, "depths": [1, 1, 2, 1]}

    def of(
        name: str, config: str, key: str = "pooler_output", side: int = 224, **settings: Any
    ) -> Subject:
        def make() -> nn.Module:
            return getattr(transformers, name)(getattr(transformers, config)(**settings))

        return Subject("transformers", name, make, (side, side), key)

    return [
        of("ViTModel", "ViTConfig", **wide), of("DeiTModel", "DeiTConfig", **wide),
        of("BeitModel", "BeitConfig", **wide),
        of("Dinov2Model", "Dinov2Config", **dino),
        of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **dino),
        of("CLIPVisionModel", "CLIPVisionConfig", **clip),
        of("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", **clip),
        of("SiglipVisionModel", "SiglipVisionConfig", **wide),
        of("ResNetModel", "ResNetConfig", embedding_size=16, **stages),
        of("RegNetModel", "RegNetConfig", embedding_size=16, groups_width=16, **stages),
        of("ConvNextModel", "ConvNextConfig", **stages),
        of("SwinModel", "SwinConfig", **swin),
        of("Swinv2Model", "Swinv2Config", side=256, image_size=256, window_size=8, **swin),
    ]  # fmt: skip


def by_hand(
    explainer: gcfast.Explainer, anchor: Tensor, positive: Tensor, negative: Tensor
) -> Tensor:
    """The anchor's map [1, h, w] by one backward pass through the whole model."""
    network = explainer.network
    kept: list[Tensor] = []
    runs = 0

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal runs
        del module, args
        runs += 1
        if runs != network.layer_run:
            return None
        first = output if isinstance(output, Tensor) else next(iter(output))
        kept.append(first)
        # What a later layer writes over is a copy.
        return first.clone() if isinstance(output, Tensor) else (first.clone(), *output[1:])

    def embedded(images: Tensor) -> Tensor:
        out = network.embedding(network.model(images), len(images))
        return F.normalize(out.float(), dim=1)

    network.model.eval()
    with torch.no_grad():
        p, n = embedded(positive), embedded(negative)
    assert network.layer is not None
    handle = network.layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            f = embedded(anchor.clone().requires_grad_())
            loss = ((f - p).square().sum(1) - (f - n).square().sum(1)).sum()
            (gradient,) = torch.autograd.grad(loss, kept[0])
    finally:
        handle.remove()
    size = (anchor.shape[2], anchor.shape[3])
    layout = network.layout or (lambda tensor, _: tensor)
    activations = layout(kept[0].detach(), size)
    weights = -layout(gradient, size).mean((2, 3))[0]
    best = weights.argsort(descending=True, stable=True)[:CHANNELS]
    cam = (weights[best, None, None] * activations[0, best]).sum(0)
    cam = cam / cam.abs().max()
    share = network.share(activations, size)
    inner = [max(1, round(s * part)) for s, part in zip(size, share, strict=True)]
    drawn = F.interpolate(cam[None, None], inner, mode="bilinear", align_corners=False)[0]
    return F.pad(drawn, (0, size[1] - inner[1], 0, size[0] - inner[0]))


def pictures(count: int, size: tuple[int, int]) -> Tensor:
    """Colored clouds [count, 3, h, w]: noise alone gives all networks the same embedding."""
    clouds = F.interpolate(torch.randn(count, 3, 5, 5), size, mode="bicubic")
    return clouds + 0.2 * torch.randn(count, 3, *size)


def settle(model: nn.Module, images: Tensor) -> None:
    """Take the statistics of batch normalization from images; random weights come without them.

    Many a network's embeddings are else the same for all images.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all passes
    with torch.no_grad():
        model(images)
    model.eval()


def measured(subject: Subject) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model = subject.make().eval()
    images = pictures(FLAT_IMAGES + 2, subject.size)
    settle(model, images)
    table = gcfast.layers(model, images[0], output_key=subject.output_key)
    default = table.default
    if default is None:
        return {"layer": None}
    explainer = gcfast.Explainer(
        model,
        output_key=subject.output_key,
        channels=CHANNELS,
        objective=gcfast.DistanceDifference(),
    )
    triplet = [images[i : i + 1] for i in range(3)]
    ours = explainer.explain_triplet(*triplet, relu=False).anchor
    with torch.inference_mode(False):
        wanted = by_hand(explainer, *triplet)
    batches = [(images[:FLAT_IMAGES], ["a", "b"] * (FLAT_IMAGES // 2))]
    explainer.build(batches)
    flat = explainer.explain_batch(images[:FLAT_IMAGES], details=True).flat
    return {
        "layer": default.name,
        "layout": default.layout,
        "grid": f"{default.grid[0]} x {default.grid[1]}",
        "channels": default.channels,
        "closed_form": default.closed_form,
        "difference": float((ours - wanted).abs().max()),
        "flat": float(flat.float().mean()),
    }


def subjects() -> tuple[list[Subject], list[str]]:
    """All that can be made here, and what cannot."""
    make_torchvision_importable()
    found, left_out = own_subjects(), []
    for more in (lightning_subjects, timm_subjects, transformers_subjects):
        try:
            found += more()
        except ImportError as error:
            left_out.append(f"{more.__name__}: {error}")
    return found, left_out


def page(rows: list[dict[str, Any]], untried: list[str]) -> str:
    """The table as Markdown, and the names of the networks that have no row yet."""
    lines = [
        "# Networks that were tried",
        "",
        "Each from its real class with random weights (batch normalization with the statistics",
        "of the pictures), explained with no `layer` and no `reshape` given. The map of a triplet,",
        "with its sign, was compared with one that a hook, one backward pass through the whole",
        f"model and the formula give; both lie in [-1, 1], and the bound is {TOLERANCE:g}.",
        f"*Flat* is the share of the {FLAT_IMAGES} images of the database whose map is empty.",
        "Made by `python bench/compatibility.py`.",
        "",
        "| network | default layer | layout | H x W | closed form | largest difference | flat |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['group']}: {row['name']}"
        if row.get("error"):
            lines.append(f"| {name} | – | {row['error']} | | | | |")
        elif row["layer"] is None:
            lines.append(f"| {name} | must be named | | | | | |")
        else:
            closed = "yes" if row["closed_form"] else "no"
            lines.append(
                f"| {name} | `{row['layer']}` | {row['layout']} | {row['grid']} | {closed} | "
                f"{row['difference']:.0e} | {row['flat']:.0%} |"
            )
    if untried:
        lines += ["", f"In the program and not run yet: {', '.join(untried)}."]
    return "\n".join(lines) + "\n"


def main(command: list[str] | None = None) -> int:
    """Return 0 if every map that was made is the right one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of names")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for both files instead")
    asked = parser.parse_args(command)
    torch.set_num_threads(asked.threads)
    results = (asked.out or ROOT / "bench" / "results") / "compatibility.json"
    written = (asked.out or ROOT / "docs") / "compatibility.md"
    found, left_out = subjects()
    # Rows of earlier runs stay, so that the table can be made in pieces.
    known = _read(results)
    wrong = []
    for subject in found:
        if asked.only and not any(part in subject.name for part in asked.only):
            continue
        row: dict[str, Any] = {"group": subject.group, "name": subject.name}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row |= measured(subject)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if not row.get("difference", 1.0) <= TOLERANCE:
            wrong.append(f"{subject.group}: {subject.name}")
        known[subject.group, subject.name] = row
        order = {(one.group, one.name): i for i, one in enumerate(found)}
        rows = sorted(known.values(), key=lambda r: order.get((r["group"], r["name"]), len(order)))
        text = json.dumps({"torch": torch.__version__, "rows": rows}, indent=1)
        results.write_text(text + "\n")
        written.write_text(page(rows, [name for at, name in order if (at, name) not in known]))
        print(json.dumps(row), flush=True)
    for line in left_out:
        print(f"left out: {line}")
    print(f"{len(wrong)} maps are not the right ones", *wrong, sep="\n  ")
    return bool(wrong)


def _read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file that the same PyTorch has written; none where there is no such file."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    same = kept["torch"] == torch.__version__
    return {(row["group"], row["name"]): row for row in kept["rows"] if same}


if __name__ == "__main__":
    sys.exit(main())
