"""The command ``gcfast serve``: a database and its network behind HTTP."""

from __future__ import annotations

import argparse

from gcfast.cli.inputs import load_network, open_on
from gcfast.serve.served import Served
from gcfast.serve.server import run
from gcfast.serve.settings import ServeSettings


def serve_database(options: argparse.Namespace) -> None:
    """Serve the database that the options name, until a signal.

    Raises:
        ValueError: a setting out of range; the database does not say how its pictures were
            prepared.
        GcfastError: the model or the database cannot be used; the extra is not installed.
        OSError: the address cannot be bound.
    """
    settings = ServeSettings(
        batch_size=options.batch_size,
        wait=options.wait / 1000,
        queue=options.queue,
        timeout=options.timeout,
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        decoders=options.decoders,
        center=options.center,
        watch=options.watch,
        hosts=tuple(options.allow_host or ()),
    )
    loaded = load_network(options)

    def source() -> Served:
        opened = open_on(loaded, options, k=options.k, index=options.index, refine=options.refine)
        images = None if options.no_pictures else opened.images
        return Served(opened.explainer, opened.preprocessing, images)

    run(source, settings, host=options.host, port=options.port)
