"""explain_pair and explain_toward against forward passes, and how exact the pairs are.

    OMP_NUM_THREADS=1 python bench/pair_speed.py [--network efficientnet-lite0] [--json FILE]

Both sides get the same channels-last images, B of them; a pair is held against two passes. "places"
is explain_pair with the correspondence of places, at B = 1. Times are CPU seconds of the process.
The parts of each image are compared with the cosine before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import conditions, paired
from subjects import NETWORKS, images, network

import gcfast

TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", nargs="+", default=["efficientnet-lite0"], choices=sorted(NETWORKS)
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record = {"conditions": conditions(), "batch": arguments.batch}
    print(record)
    for name in arguments.network:
        model, layer = network(name)
        explainer = gcfast.Explainer(model, layer, channels="all")
        x, y = (
            images(arguments.batch, seed).contiguous(memory_format=torch.channels_last)
            for seed in (1, 2)
        )
        one, other = x[:1].clone(), y[:1].clone()
        with torch.no_grad():
            vectors = F.normalize(model(y), dim=1)
            cosine = (F.normalize(model(x), dim=1) * vectors).sum(1)
        why = explainer.explain_pair(x, y)
        error = max(
            float((parts.sum((1, 2)) - cosine).abs().max())
            for parts in (why.query_parts, why.match_parts)
        )
        assert error <= TOLERANCE, error

        def timed(ours, passes, *inputs, model=model):
            def forward():
                with torch.no_grad():
                    for batch in inputs[:passes]:
                        model(batch)

            return paired(
                lambda: ours(*inputs), forward, rounds=arguments.rounds, clock=time.process_time
            )

        found = {
            "pair": timed(explainer.explain_pair, 2, x, y),
            "toward": timed(explainer.explain_toward, 1, x, vectors),
            "places": timed(
                lambda a, b, e=explainer: e.explain_pair(a, b, correspondence=True), 2, one, other
            ),
        }
        print(f"{name}, B = {arguments.batch}, parts less cosine at most {error:.1e}")
        print(f"  explain_pair / two forward passes: {found['pair']}")
        print(f"  explain_toward / forward pass: {found['toward']}")
        print(f"  explain_pair with places, B = 1 / two forward passes: {found['places']}")
        record[name] = {"error": error} | {key: one.record() for key, one in found.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
