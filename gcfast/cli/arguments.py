"""The arguments of every command, and which function runs it."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gcfast._log import LEVELS
from gcfast.cli.given.arguments import add_embeddings
from gcfast.cli.on_ray import add_ray
from gcfast.images.preprocessing import INTERPOLATIONS


class _Defaults(argparse.HelpFormatter):
    """Help that ends with the default, if there is one worth saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default is None or action.default is False or action.dest == "help":
            return text
        return f"{text}; default: %(default)s"


def parser() -> argparse.ArgumentParser:
    """Return the parser; ``run`` in what it parses is a ``module:function`` of this package."""
    # Made of the pieces of this module.
    from gcfast.cli.direct.arguments import add_explain, add_pair
    from gcfast.cli.doctor.arguments import add_doctor
    from gcfast.cli.export.arguments import add_export
    from gcfast.cli.serve.arguments import add_serve

    whole = argparse.ArgumentParser(
        prog="gcfast",
        description="Explain image embeddings in one forward pass.",
        epilog="Model SPEC: package.module:function, timm/NAME, torchvision/NAME or hf/NAME.",
    )
    whole.add_argument("--version", action="version", version=f"gcfast {version('gcfast')}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_layers,
        _add_build,
        _add_append,
        _add_calibrate,
        add_explain,
        add_pair,
        _add_evaluate,
        add_serve,
        add_export,
        _add_compress,
        _add_index,
        _add_remove,
        _add_relabel,
        _add_merge,
        _add_info,
        _add_demo,
        add_doctor,
    ):
        add(commands)
    for command in commands.choices.values():
        log = command.add_argument_group("log")
        log.add_argument("--log-level", choices=LEVELS, help="write a log to standard error")
        log.add_argument(
            "--log-json", type=Path, metavar="FILE", help="add the log to a file, as lines of JSON"
        )
        command.set_defaults(words=_words(command))
    return whole


def _words(command: argparse.ArgumentParser) -> dict[str, str]:
    """Return what the command line calls the arguments that errors of the library name."""
    words = {a.dest: a.option_strings[0] for a in command._actions if a.option_strings}
    pictures = "--data" if "data" in words else "--images"
    return {
        "root": pictures,
        "loader": pictures,
        "labels_csv": "--labels",
        "reshape": "--tokens",
        "hosts": "--allow-host",
        **words,
    }


def _command(commands: Any, name: str, run: str, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, formatter_class=_Defaults)
    assert isinstance(command, argparse.ArgumentParser)
    command.set_defaults(run=run)
    return command


def _add_layers(commands: Any) -> None:
    layers = _command(
        commands, "layers", "build:show_layers", "list the layers of a model that can be explained"
    )
    layers.add_argument("model", metavar="SPEC", help="see gcfast --help")
    layers.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="S",
        help="of the image that is tried, in pixels; default: what the model's library says",
    )
    _add_source(layers)


def _add_append(commands: Any) -> None:
    append = _command(
        commands, "append", "labelled:append_pictures", "add labelled pictures to a database"
    )
    _add_labelled(append, "further pictures, one folder per class")
    _add_model(append)


def _add_calibrate(commands: Any) -> None:
    calibrate = _command(
        commands,
        "calibrate",
        "labelled:calibrate_database",
        "learn from held-out pictures how far a map can be relied on",
    )
    _add_labelled(calibrate, "pictures that are not in the database, one folder per class")
    _add_model(calibrate)


def _add_labelled(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--database", type=Path, required=True, metavar="DB")
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help=what)
    command.add_argument(
        "--labels", type=Path, metavar="CSV", help="columns path and label, not class folders"
    )


def _add_build(commands: Any) -> None:
    build = _command(
        commands, "build", "build:build_database", "make a database from labelled pictures"
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="DB", help="the database's folder"
    )
    build.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="pictures, one folder per class",
    )
    build.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="columns path and label, not class folders",
    )
    add_embeddings(build)
    build.add_argument("--force", action="store_true", help="replace an existing database")
    build.add_argument("--resume", action="store_true", help="continue a build that was stopped")
    _add_storage(build)
    _add_model(build)
    add_ray(build)

    method = build.add_argument_group("method")
    method.add_argument(
        "--layer", metavar="NAME", help="dotted name; default: the last spatial one"
    )
    method.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="the layer gives tokens (a transformer), the first N of which are not image patches",
    )
    method.add_argument(
        "--method",
        choices=["gradcam", "gradcam++", "proxy", "elementwise"],
        default="gradcam",
        help="how gradients become channel weights; proxy: contrasted class proxies, no gradients; "
        "elementwise: gradient times activation, for transformers",
    )
    method.add_argument(
        "--objective",
        choices=["triplet", "distance-difference", "positive", "negative"],
        default="triplet",
        help="what is differentiated",
    )
    method.add_argument("--margin", type=float, help="of the triplet objective; default: 0.2")
    method.add_argument(
        "--triplets", type=_count, default=50, metavar="T", help='drawn for a picture, or "all"'
    )
    method.add_argument(
        "--channels", type=_count, default=50, metavar="M", help='kept for a picture, or "all"'
    )
    method.add_argument(
        "--evidence",
        choices=["for", "against"],
        default="for",
        help="channels that support the match, or that oppose it (the paper's sign)",
    )
    method.add_argument(
        "--on-no-triplet",
        choices=["hardest", "skip"],
        default="hardest",
        help="a picture with no triplet of positive loss takes its hardest one, or is left out",
    )
    method.add_argument(
        "--no-l2-normalize", action="store_true", help="compare embeddings as the model gives them"
    )
    method.add_argument("--seed", type=int, default=0, help="of the draws of triplets")

    _add_view(build, "preprocessing (default: what the model's library says)")


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "evaluate:evaluate_database",
        "the paper's tables and curves, with controls, on annotated pictures",
    )
    _add_from_database(evaluate)
    _add_moved(evaluate)
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="KIND:ROOT",
        help="cub:ROOT, coco:ROOT or folder:ROOT; the last is your own: ROOT/images/CLASS/…, with "
        "ROOT/masks/CLASS/….png (white is the object), or ROOT/boxes.csv (columns path, x0, y0, "
        "x1, y1), or both",
    )
    evaluate.add_argument(
        "--train",
        metavar="KIND:ROOT",
        help="the pictures that the database was built from; default: where it says they are",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the controls and intervals")
    evaluate.add_argument(
        "--thorough",
        action="store_true",
        help="localise every row's maps, and MaxBoxAccV2: half a second more for each image; "
        "AP and IoU of all images, not of 256",
    )
    _add_model(evaluate)


def _add_compress(commands: Any) -> None:
    compress = _command(
        commands,
        "compress",
        "database:compress_database",
        "make a small database of k-means centers",
    )
    compress.add_argument("database", type=Path, metavar="DB")
    compress.add_argument(
        "--out", type=Path, required=True, metavar="DB2", help="the small database's folder"
    )
    compress.add_argument(
        "--centers", type=int, default=50, metavar="K", help="rows of the small database"
    )
    compress.add_argument("--seed", type=int, default=0, help="of the k-means")
    compress.add_argument("--iterations", type=int, default=25, metavar="I", help="of the k-means")
    _add_storage(compress)
    compress.add_argument("--force", action="store_true", help="replace an existing database")


def _add_index(commands: Any) -> None:
    index = _command(
        commands,
        "index",
        "database:index_database",
        "store a FAISS index with a database, for explain --index stored",
    )
    index.add_argument("database", type=Path, metavar="DB")
    index.add_argument(
        "--factory", required=True, metavar="STRING", help='FAISS factory string: "IVF4096,PQ32", …'
    )


def _add_remove(commands: Any) -> None:
    remove = _command(commands, "remove", "database:remove_rows", "take pictures out of a database")
    remove.add_argument("database", type=Path, metavar="DB")
    remove.add_argument("ids", nargs="*", metavar="ID", help="the picture's id: its path")
    remove.add_argument("--ids-from", type=Path, metavar="FILE", help="one id a line")


def _add_relabel(commands: Any) -> None:
    relabel = _command(
        commands, "relabel", "database:relabel_rows", "give pictures of a database other labels"
    )
    relabel.add_argument("database", type=Path, metavar="DB")
    relabel.add_argument(
        "--labels", type=Path, required=True, metavar="CSV", help="columns path and label"
    )


def _add_merge(commands: Any) -> None:
    merge = _command(commands, "merge", "database:merge_databases", "join databases of one model")
    merge.add_argument("databases", nargs="+", type=Path, metavar="DB")
    merge.add_argument(
        "--out", type=Path, required=True, metavar="DB", help="the new database's folder"
    )
    merge.add_argument(
        "--prefixes", nargs="+", metavar="P", help="put before the ids of each database"
    )
    merge.add_argument("--force", action="store_true", help="replace an existing database")


def _add_info(commands: Any) -> None:
    info = _command(commands, "info", "database:describe_database", "describe a database")
    info.add_argument("database", type=Path, metavar="DB")
    info.add_argument("--json", action="store_true", help="machine-readable, the whole manifest")
    info.add_argument("--verify", action="store_true", help="compare all checksums")


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands, "demo", "demo:show_demo", "a complete example on drawn birds; needs no data"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("gcfast-demo"),
        metavar="DIR",
        help="the folder for the page",
    )


def _add_from_database(
    parser: argparse.ArgumentParser, *, refine: str | None = None, required: bool = True
) -> None:
    """Add the database, how maps are refined, and the output folder."""
    parser.add_argument("--database", type=Path, required=required, metavar="DB")
    _add_refine(parser, refine)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty"
    )


def _add_refine(parser: argparse._ActionsContainer, refine: str | None) -> None:
    parser.add_argument(
        "--refine",
        type=_layers,
        default=refine,
        metavar="LAYERS",
        help='earlier layers whose outputs make maps finer: "auto", their names from coarse to '
        f'fine, as "layer3,layer2", or "none"; default: {refine or "none"}',
    )


def _add_lent(parser: argparse._ActionsContainer, *, index: bool = True) -> None:
    """Add which rows lend their weights, and what is taken out of their maps."""
    parser.add_argument("--k", type=int, default=1, help="neighbors that lend their weights")
    if index:
        parser.add_argument(
            "--index", default="exact", help='"exact", "stored" or a FAISS factory string'
        )
    parser.add_argument(
        "--center", type=float, default=0.0, help="share of the mean response to subtract"
    )


def _add_moved(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="the database's pictures, if they moved"
    )


def _add_view(parser: argparse.ArgumentParser, title: str) -> None:
    view = parser.add_argument_group(title)
    view.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="S",
        help="the network's input in pixels: height and width, or one side of a square",
    )
    view.add_argument(
        "--fit",
        "--resize",
        dest="resize",
        choices=["crop", "pad", "squash", "stretch"],
        help="fill the input and cut off the rest, show all with margins, or distort "
        "(squash and stretch are the same)",
    )
    view.add_argument(
        "--interpolation", choices=INTERPOLATIONS, help="the filter that resizes pictures"
    )
    view.add_argument(
        "--crop-pct",
        type=float,
        metavar="P",
        help="share of each side of the scaled picture that is cut out, as timm has it",
    )
    view.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of [0, 1]")
    view.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of [0, 1]")
    view.add_argument(
        "--depth",
        type=_depth,
        metavar="BITS",
        help='of 16-bit pictures: 8 to 16; "range" stretches each from its lowest to its '
        'highest value; "auto" (the default) goes by the file and its highest value',
    )
    view.add_argument(
        "--transform",
        metavar="SPEC",
        help="package.module:function from a PIL.Image to a tensor [3, H, W], in place of these",
    )


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        choices=["float32", "float16"],
        default="float32",
        help="of embeddings and weights on disk",
    )


def _add_source(parser: Any) -> None:
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a checkpoint")
    parser.add_argument(
        "--output-key", metavar="KEY", help="which output to use, if the model returns several"
    )
    parser.add_argument(
        "--pool",
        choices=["class", "mean"],
        help="for hf/NAME: take the class token, or the mean of the patches, as the embedding",
    )
    parser.add_argument("--device", help='"cpu", "cuda", …; default: cuda if there is one')


def _add_spec(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    model = parser.add_argument_group(title)
    model.add_argument("--model", required=True, metavar="SPEC", help="see gcfast --help")
    _add_source(model)
    return model


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = _add_spec(parser, "model and machine")
    model.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="pictures in a batch"
    )
    model.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode; 0: none",
    )
    model.add_argument("--strict", action="store_true", help="stop at the first unreadable picture")


def _layers(text: str) -> str | list[str] | None:
    if text == "none":
        return None
    return text if text == "auto" else text.split(",")


def _count(text: str) -> int | str:
    return text if text == "all" else int(text)


def _depth(text: str) -> int | str:
    return text if text in ("auto", "range") else int(text)
