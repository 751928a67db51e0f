"""Deletion, insertion and ROAD of heat maps of embeddings, by torch-cam's and grad-cam's own code.

    pip install --no-deps torchvision torchcam==0.5.0 grad-cam==1.5.7 ttach opencv-python-headless
    python bench/faithfulness.py [--images 16] [--json FILE]

Those tools ask how a class score falls when what a map marks is taken away. An embedding has no
class score; here it is the cosine to a reference: to the image's own embedding, or to the mean of
the class that its nearest row has. Low deletion, high insertion and high ROAD are good. ROAD is
half of what the score loses more by removing the hottest pixels than by removing the coldest.

What deletion removes takes the picture's mean colour. Black would be something to see itself: it
puts the demonstration's birds farther from themselves when a part of them is blackened than when
everything is. A picture of the mean colour alone still has a cosine near 1 to most birds, all
embeddings of that network being close together; it is printed, since no score falls much below it.

The pictures and the network are those of `gcfast demo`. Controls are "noise", random values on the
grid of the feature map, as coarse as a map that is not refined, and "channel sum", a map without
any weights, plain and refined. The refined Grad-CAM is that with center=1.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import conditions
from peers import make_torchvision_importable, upsampled
from torch import Tensor, nn

import gcfast

PERCENTILES = (20, 40, 60, 80)


class Given:
    """Maps that are there already, in the place of torch-cam's extractor."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *_args: object, **_settings: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


def blank(images: Tensor) -> Tensor:
    """Images [B, 3, h, w] of each one's mean colour."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def deletion_insertion(
    model: nn.Module, images: Tensor, maps: Tensor, references: Tensor, *, steps: int = 20
) -> tuple[float, float]:
    """Mean areas under the two curves of the cosine to each image's reference.

    Args:
        model: images [B, 3, h, w] to embeddings [B, D].
        images: [B, 3, h, w]; what is deleted takes the mean colour of its image.
        maps: [B, h, w].
        references: [B, D].
        steps: of each curve.
    """
    make_torchvision_importable()
    from torchcam.metrics import DeletionInsertionMetric

    unit = F.normalize(references, dim=1)
    metric = DeletionInsertionMetric(
        Given(model, maps),
        lambda output: F.normalize(output, dim=1) @ unit.T,
        steps=steps,
        baseline=blank,
    )
    metric.update(images, list(range(len(images))))
    summary = metric.summary()
    return summary["deletion_auc"], summary["insertion_auc"]


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    references: Tensor,
    *,
    percentiles: Sequence[int] = PERCENTILES,
) -> Tensor:
    """ROAD, hottest against coldest first, of the cosine to each image's references: [B, R].

    Args:
        model: as for :func:`deletion_insertion`.
        images: as for :func:`deletion_insertion`.
        maps: as for :func:`deletion_insertion`.
        references: [B, R, D]; filling in, which takes the time, is done once for all R.
        percentiles: of the pixels that are removed. The filled-in pixels carry a little noise from
            torch's global generator.
    """
    make_torchvision_importable()
    from pytorch_grad_cam.metrics.road import ROADCombined

    targets = [lambda output, r=r: F.cosine_similarity(output[None], r, dim=1) for r in references]
    combined = ROADCombined(percentiles=list(percentiles))
    return torch.from_numpy(combined(images, maps.numpy(), targets, model))


def main() -> None:
    from gcfast.demo.birds import as_batch, draw_bird
    from gcfast.demo.network import load_network
    from gcfast.demo.species import SPECIES, TRAINING_LABELS, UNSEEN_LABELS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16, help="pictures of unseen species")
    parser.add_argument("--rows", type=int, default=8, help="pictures of each training species")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    network = load_network()
    explainers = {
        evidence: gcfast.Explainer(network, "features", evidence=evidence, seed=options.seed)
        for evidence in ("for", "against")
    }
    loader = []
    for label in TRAINING_LABELS:
        birds = [draw_bird(label, seed=options.seed, index=2 * i) for i in range(options.rows)]
        loader.append((as_batch(birds), [SPECIES[label].name] * options.rows))
    best = gcfast.Explainer(network, "features", seed=options.seed, **gcfast.BEST)
    for explainer in (*explainers.values(), best):
        explainer.build(loader)
    chosen = [UNSEEN_LABELS[i % len(UNSEEN_LABELS)] for i in range(options.images)]
    birds = [draw_bird(y, seed=options.seed, index=2 * i + 1) for i, y in enumerate(chosen)]
    images = as_batch(birds)
    why = explainers["for"].explain_batch(images, details=True)
    database = explainers["for"].database
    assert database is not None
    means = torch.stack(
        [database.embeddings[database.labels == label].mean(0) for label in why.labels[:, 0]]
    )
    with torch.inference_mode():
        total = network.features(images).sum(1)
        empty = network(blank(images))
    size = images.shape[2:]
    refined = gcfast.Explainer(network, "features", database, refine="auto")
    proxies = gcfast.Explainer(network, "features", best.database, method="proxy")
    finer = best.network.embed(images, finer=True).finer
    total_refined = functools.reduce(gcfast.ops.refine, finer, total.clamp(min=0))
    maps = {
        "noise": upsampled(torch.rand(total.shape), size),
        "channel sum": upsampled(total, size),
        "Grad-CAM, for, top-50": why.maps,
        "the same, center=1": explainers["for"].explain_batch(images, center=1.0),
        "Grad-CAM, against, top-50": explainers["against"].explain_batch(images),
        "channel sum, refined": upsampled(total_refined, size),
        "Grad-CAM, for, refined": refined.explain_batch(images, center=1.0),
        "class proxy": proxies.explain_batch(images),
        "class proxy, refined": best.explain_batch(images),
    }
    print(f"{len(images)} drawn birds of unseen species, {len(database)} rows, seed {options.seed}")
    both = torch.stack([why.embeddings, means], 1)  # [B, 2, D]
    nothing = F.cosine_similarity(empty[:, None], both, dim=2).mean(0).tolist()
    print(f"cosine of the mean colour alone: own {nothing[0]:.4f}, class {nothing[1]:.4f}")
    columns = [f"{m}, {r}" for r in ("own", "class") for m in ("deletion", "insertion", "ROAD")]
    record: dict[str, object] = {
        "conditions": conditions(),
        "images": len(images),
        "rows": len(database),
        "seed": options.seed,
        "cosine of the mean colour alone": dict(zip(("own", "class"), nothing, strict=True)),
    }
    print(" " * 26 + "".join(f"{c:>18s}" for c in columns))
    for name, heat in maps.items():
        cells = []
        removed = road(network, images, heat, both).mean(0).tolist()
        for references, one in zip((why.embeddings, means), removed, strict=True):
            cells += [*deletion_insertion(network, images, heat, references), one]
        print(f"{name:26s}" + "".join(f"{cell:18.4f}" for cell in cells), flush=True)
        record[name] = dict(zip(columns, cells, strict=True))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
