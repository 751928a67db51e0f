"""The arguments of ``gcfast serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gcfast.cli.arguments import _add_lent, _add_moved, _add_refine, _add_spec, _command


def add_serve(commands: Any) -> None:
    """Add the command to the parser's."""
    serve = _command(
        commands,
        "serve",
        "serve.command:serve_database",
        "answer explanations over HTTP, with a page to drop pictures on",
    )
    serve.set_defaults(log_level="info")
    serve.add_argument("--database", type=Path, required=True, metavar="DB")
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to bind to; not loopback: be warned"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one and says which")
    serve.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="a name that requests may be addressed to, once for each; default: those of loopback, "
        "or any where --host is another",
    )

    batches = serve.add_argument_group("batches and limits")
    batches.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="pictures in the model at once"
    )
    batches.add_argument(
        "--wait", type=float, default=5, metavar="MS", help="that a picture waits for others"
    )
    batches.add_argument(
        "--queue", type=int, default=128, metavar="N", help="requests at once; one more gets 503"
    )
    batches.add_argument(
        "--timeout", type=float, default=30, metavar="SECONDS", help="of a request; then 504"
    )
    batches.add_argument(
        "--max-bytes", type=int, default=16 * 2**20, metavar="N", help="of a request; more is 413"
    )
    batches.add_argument(
        "--max-pixels", type=int, default=40_000_000, metavar="N", help="of a picture; more is 413"
    )
    batches.add_argument(
        "--decoders", type=int, default=2, metavar="N", help="threads that decode and encode"
    )

    answers = serve.add_argument_group("answers")
    _add_refine(answers, "auto")
    _add_lent(answers)
    _add_moved(answers)
    answers.add_argument(
        "--no-pictures", action="store_true", help="never show the database's own pictures"
    )
    answers.add_argument(
        "--watch",
        type=float,
        default=1,
        metavar="SECONDS",
        help="between looks whether the database was exchanged; 0: on SIGHUP alone",
    )

    _add_spec(serve, "model")
