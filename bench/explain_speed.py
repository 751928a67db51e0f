"""explain_batch against the forward pass: in the same memory format, and as a user writes it.

    python bench/explain_speed.py [--network efficientnet-lite0 resnet50] [--compiled] [--json FILE]

Both sides get the same input. "same format": channels-last images for both. "as written":
`model(images)` on contiguous NCHW images under inference_mode, against explain_batch on the same
NCHW images, whose conversion is part of the time. The maps are compared with maps worked out from
the NCHW forward pass before anything is timed. "BEST": the same format, with the settings of
gcfast.BEST. "compiled": a model wrapped by torch.compile (Inductor) against itself, NCHW images for
both; its maps are compared with those of the model that is not compiled.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import conditions, paired
from subjects import CONVOLUTIONAL, explainer_with_rows, images, network
from torch import Tensor, nn

import gcfast

MAP_TOLERANCE = 1e-4


def maps_by_hand(
    model: nn.Module, layer: str, database: gcfast.Database, batch: Tensor
) -> tuple[Tensor, Tensor]:
    """(maps, rows used), from a plain NCHW forward pass and a dense sum over all channels."""
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _module, _args, output: kept.append(
            output if isinstance(output, Tensor) else output[0]
        )
    )
    try:
        embeddings = F.normalize(model(batch), dim=1)
    finally:
        hook.remove()
    nearest = torch.cdist(embeddings.double(), database.embeddings.double()).argmin(1)
    dense = torch.zeros(len(batch), kept[0].shape[1])
    dense.scatter_(1, database.channels[nearest], database.weights[nearest])
    cam = torch.einsum("bchw,bc->bhw", kept[0], dense).clamp(min=0)
    cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    size = batch.shape[-2:]
    maps = F.interpolate(cam[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps, nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=CONVOLUTIONAL, choices=CONVOLUTIONAL)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the database")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="also compile, which takes minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record = {"conditions": conditions(), "batch": arguments.batch, "rows": arguments.rows}
    print(record)

    for name in arguments.network:
        model, layer = network(name)
        explainer = explainer_with_rows(model, layer, arguments.rows)
        database = explainer.database
        assert database is not None
        batch = images(arguments.batch, seed=9)
        batch_last = batch.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted, nearest = maps_by_hand(model, layer, database, batch)
            why = explainer.explain_batch(batch, details=True)
            assert torch.equal(why.neighbors[:, 0], nearest)
            error = float((why.maps - wanted).abs().max())
            assert error <= MAP_TOLERANCE, error
            same = paired(
                lambda e=explainer, x=batch_last: e.explain_batch(x),
                lambda m=model, x=batch_last: m(x),
                rounds=arguments.rounds,
            )
            written = paired(
                lambda e=explainer, x=batch: e.explain_batch(x),
                lambda m=model, x=batch: m(x),
                rounds=arguments.rounds,
            )
        best = explainer_with_rows(model, layer, arguments.rows, **gcfast.BEST)
        with torch.inference_mode():
            assert not best.explain_batch(batch, details=True).flat.any()
            finer = paired(
                lambda e=best, x=batch_last: e.explain_batch(x),
                lambda m=model, x=batch_last: m(x),
                rounds=arguments.rounds,
            )
        print(f"{name}, B = {arguments.batch}, 224 x 224, largest difference of maps {error:.1e}")
        print(f"  explain_batch / forward, same memory format: {same}")
        print(f"  explain_batch / forward as a user writes it: {written}")
        record[name] = {
            "map_error": error,
            "same_format": same.record(),
            "as_written": written.record(),
            "best": finer.record(),
        }
        print(f"  explain_batch with BEST / forward, same memory format: {finer}")
        if arguments.compiled:
            compiled: Any = torch.compile(model)
            one = gcfast.Explainer(compiled, layer, database=database)
            with torch.inference_mode():
                one.explain_batch(batch)
                off = float((one.explain_batch(batch) - why.maps).abs().max())
                assert one.network.compiled is not None
                assert off <= MAP_TOLERANCE, off
                through = paired(
                    lambda e=one, x=batch: e.explain_batch(x),
                    lambda m=compiled, x=batch: m(x),
                    rounds=arguments.rounds,
                )
            print(f"  explain_batch of the compiled model / its forward pass, NCHW: {through}")
            record[name] |= {"compiled": through.record(), "compiled_map_error": off}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
