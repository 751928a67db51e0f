"""The command `gcfast`: build, explain, evaluate, compress, index, info, demo.

Results go to standard output; progress, counts of what was left out and errors to standard error.
Exit status: 0 done, 2 an error told in one line, 130 stopped by ^C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcfast.errors import GcfastError

# The commands import what they need, so that one does not wait for, or fail with, the parts of
# another.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments, without the program's name; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: If the arguments do not parse (status 2), or ask for help (0).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except KeyboardInterrupt as stop:
        print("; ".join(["gcfast: stopped", *_notes(stop)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`gcfast info DB | head`) has seen enough. Python would complain
        # once more while closing the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GcfastError, ValueError, TypeError, OSError) as error:
        print("; ".join([f"gcfast: {_one_line(error)}", *_notes(error)]), file=sys.stderr)
        return 2


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return text


# Arguments


class _Defaults(argparse.HelpFormatter):
    """Help that ends in the default, where there is one worth saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default is None or action.default is False or action.dest == "help":
            return text
        return f"{text}; default: %(default)s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gcfast",
        description="Explain image embeddings in one forward pass.",
        epilog="Model SPEC: package.module:function, timm/NAME, torchvision/NAME or hf/NAME.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    _add_explain(commands)
    _add_evaluate(commands)

    _add_compress(commands)
    _add_index(commands)
    info = commands.add_parser("info", help="describe a database", formatter_class=_Defaults)
    info.add_argument("database", type=Path, metavar="DB")
    info.add_argument("--json", action="store_true", help="machine-readable, the whole manifest")
    info.add_argument("--verify", action="store_true", help="compare all checksums")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="the whole of it on drawn birds; needs no data", formatter_class=_Defaults
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("gcfast-demo"),
        metavar="DIR",
        help="where the page goes",
    )
    demo.set_defaults(run=_demo)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="make a database from labelled pictures",
        formatter_class=_Defaults,
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="DB", help="the database's folder"
    )
    build.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="pictures, a folder for each class",
    )
    build.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="columns path and label, instead of class folders",
    )
    build.add_argument("--force", action="store_true", help="replace an existing database")
    build.add_argument(
        "--resume", action="store_true", help="go on where a build that was stopped had come to"
    )
    _add_storage(build)
    _add_model(build)

    method = build.add_argument_group("method")
    method.add_argument(
        "--layer", metavar="NAME", help="dotted name; default: the last spatial one"
    )
    method.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="the layer gives tokens (a transformer); the first N are no place in the picture",
    )
    method.add_argument(
        "--method", choices=["gradcam", "gradcam++"], default="gradcam", help="the basic method"
    )
    method.add_argument(
        "--objective",
        choices=["triplet", "distance-difference", "positive", "negative"],
        default="triplet",
        help="what is differentiated",
    )
    method.add_argument("--margin", type=float, help="of the triplet objective; default: 0.2")
    method.add_argument(
        "--triplets", type=_count, default=50, metavar="T", help='drawn a picture, or "all"'
    )
    method.add_argument(
        "--channels", type=_count, default=50, metavar="M", help='kept a picture, or "all"'
    )
    method.add_argument(
        "--evidence",
        choices=["for", "against"],
        default="for",
        help="channels that make the match, or (the paper's sign) that spoil it",
    )
    method.add_argument(
        "--on-no-triplet",
        choices=["hardest", "skip"],
        default="hardest",
        help="a picture with no triplet of positive loss takes its hardest one, or is left out",
    )
    method.add_argument(
        "--no-l2-normalize", action="store_true", help="compare the embeddings as they come"
    )
    method.add_argument("--seed", type=int, default=0, help="of the draws of triplets")

    view = build.add_argument_group("preprocessing (default: what the model's library says)")
    view.add_argument("--size", type=int, metavar="S", help="side of the network's input, pixels")
    view.add_argument(
        "--resize", choices=["crop", "stretch"], help="cut the centre square, or squeeze"
    )
    view.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of [0, 1]")
    view.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of [0, 1]")

    def run(options: argparse.Namespace) -> int:
        from gcfast.cli.build import build_database

        return build_database(options)

    build.set_defaults(run=run)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="heat maps of any pictures",
        formatter_class=_Defaults,
    )
    explain.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures or folders")
    explain.add_argument("--database", type=Path, required=True, metavar="DB")
    explain.add_argument("--out", type=Path, required=True, metavar="DIR")
    explain.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty"
    )
    explain.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where the database's pictures are, if they moved",
    )
    explain.add_argument("--k", type=int, default=1, help="neighbours that lend their weights")
    explain.add_argument(
        "--index", default="exact", help='"exact", "stored" or a FAISS factory string'
    )
    explain.add_argument(
        "--center", type=float, default=0.0, help="share of the mean response subtracted"
    )
    explain.add_argument("--alpha", type=float, default=0.55, help="opacity of the hottest heat")
    explain.add_argument(
        "--page-rows", type=int, default=200, metavar="N", help="pictures shown on index.html"
    )
    _add_model(explain)

    def run(options: argparse.Namespace) -> int:
        from gcfast.cli.explain import explain_files

        return explain_files(options)

    explain.set_defaults(run=run)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="the paper's tables and curves, with controls, on annotated pictures",
        formatter_class=_Defaults,
    )
    evaluate.add_argument("--database", type=Path, required=True, metavar="DB")
    evaluate.add_argument(
        "--data", required=True, metavar="KIND:ROOT", help="cub:ROOT, coco:ROOT or folder:ROOT"
    )
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")
    evaluate.add_argument(
        "--train",
        metavar="KIND:ROOT",
        help="the pictures that the database was built from; default: where it says they are",
    )
    evaluate.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where the database's pictures are, if they moved",
    )
    evaluate.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the controls and intervals")
    evaluate.add_argument(
        "--thorough",
        action="store_true",
        help="localise every row's maps, and MaxBoxAccV2: half a second an image more",
    )
    _add_model(evaluate)

    def run(options: argparse.Namespace) -> int:
        from gcfast.cli.evaluate import evaluate_database

        return evaluate_database(options)

    evaluate.set_defaults(run=run)


def _add_compress(commands: Any) -> None:
    compress = commands.add_parser(
        "compress", help="make a small database of k-means centres", formatter_class=_Defaults
    )
    compress.add_argument("database", type=Path, metavar="DB")
    compress.add_argument(
        "--out", type=Path, required=True, metavar="DB2", help="the small database's folder"
    )
    compress.add_argument("--centers", type=int, default=50, metavar="K", help="rows to be")
    compress.add_argument("--seed", type=int, default=0, help="of the k-means")
    compress.add_argument("--iterations", type=int, default=25, metavar="I", help="of the k-means")
    _add_storage(compress)
    compress.add_argument("--force", action="store_true", help="replace an existing database")

    def run(options: argparse.Namespace) -> int:
        from gcfast.cli.database import compress_database

        return compress_database(options)

    compress.set_defaults(run=run)


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="store a FAISS index with a database, for explain --index stored",
        formatter_class=_Defaults,
    )
    index.add_argument("database", type=Path, metavar="DB")
    index.add_argument(
        "--factory", required=True, metavar="STRING", help='as FAISS has it: "IVF4096,PQ32", …'
    )

    def run(options: argparse.Namespace) -> int:
        from gcfast.cli.database import index_database

        return index_database(options)

    index.set_defaults(run=run)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        choices=["float32", "float16"],
        default="float32",
        help="of embeddings and weights on the disk",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and machine")
    model.add_argument("--model", required=True, metavar="SPEC", help="see gcfast --help")
    model.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a checkpoint")
    model.add_argument(
        "--output-key", metavar="KEY", help="where the model returns several outputs"
    )
    model.add_argument("--device", help='"cpu", "cuda", …; default: cuda where there is one')
    model.add_argument("--batch-size", type=int, default=32, metavar="B", help="pictures a batch")
    model.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode; 0: none",
    )
    model.add_argument("--strict", action="store_true", help="stop at the first unreadable picture")


def _count(text: str) -> int | str:
    return text if text == "all" else int(text)


# Commands


def _info(options: argparse.Namespace) -> int:
    import gcfast

    # Describing it reads no weights, which a comparison of checksums would.
    database = gcfast.Database.open(options.database, verify=options.verify)
    size = sum(f.stat().st_size for f in options.database.iterdir() if f.is_file())
    facts: dict[str, Any] = {
        "database": os.fspath(options.database),
        "rows": len(database),
        "distinct labels" if database.labels.is_floating_point() else "classes": len(
            set(database.labels.tolist())
        ),
        "embedding": database.dim,
        "channels kept": database.m,
        "bytes": size,
    }
    if options.json:
        print(json.dumps(facts | {"manifest": database.manifest}, indent=2, ensure_ascii=False))
        return 0
    for name, value in (facts | _flat(database.manifest)).items():
        print(f"{name:<28} {value:,}" if type(value) is int else f"{name:<28} {value}")
    return 0


def _flat(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The manifest's single values by dotted name; long lists become their length."""
    facts: dict[str, Any] = {}
    for key, value in manifest.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            facts |= _flat(value, f"{name}.")
        elif isinstance(value, list) and (len(value) > 8 or any(map(_nested, value))):
            facts[name] = f"{len(value)} values"
        elif isinstance(value, list):
            facts[name] = ", ".join(map(str, value))
        else:
            facts[name] = value
    return facts


def _nested(value: object) -> bool:
    return isinstance(value, (list, Mapping))


def _demo(options: argparse.Namespace) -> int:
    from gcfast.demo.run import run_demo

    return int(run_demo(out_dir=options.out, seed=0, progress=sys.stderr.isatty()))
