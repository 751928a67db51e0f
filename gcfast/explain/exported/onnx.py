"""An explainer as an ONNX graph, and the arrays that a graph with tables as inputs takes."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import require_choice
from gcfast._extras import needs_extra
from gcfast.database.database import Database
from gcfast.database.edit import without_images
from gcfast.errors import ModelMismatchError, UnsupportedModelError
from gcfast.explain.exported.module import ExportedExplainer
from gcfast.explain.exported.program import (
    AXES,
    ROWS,
    TABLE_AXES,
    check_sizes,
    decomposed,
    first_line,
    quiet,
    require_free,
    staged,
)
from gcfast.explain.maps import proxies_of
from gcfast.model.fingerprint import difference, outputs_differ
from gcfast.search.faiss_search import ExactSearch, temperature

if TYPE_CHECKING:
    import onnxruntime

TABLES = ("inside", "external", "inputs")
DETAILS = ("maps", "embeddings", "neighbors", "distances", "labels")
METADATA = "gcfast"  # the entry of a graph that says what it was made of
PROTOBUF_BYTES = 2**31 - 1  # of a file without external data
ROOM_BYTES = 16 * 2**20  # left for the graph itself


def export_onnx(
    module: ExportedExplainer,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    tables: str,
    dynamic: Collection[str],
    manifest: dict[str, Any],
) -> None:
    """See :meth:`gcfast.Explainer.export_onnx`; ``manifest`` is the database's."""
    require_choice("tables", tables, TABLES)
    with needs_extra("onnx", "export_onnx"):
        import onnx_ir as ir
        import onnxruntime
        import onnxscript  # noqa: F401, which PyTorch's exporter needs
    held = module.model if tables == "inputs" else module
    size = sum(t.nbytes for t in (*held.parameters(), *held.buffers()))
    if tables != "external" and size + ROOM_BYTES > PROTOBUF_BYTES:
        raise ValueError(
            f"`tables` must be 'external' for {size:,} bytes in the graph, of which one file holds "
            f"{PROTOBUF_BYTES:,}, got {tables!r}"
        )
    arguments = _arguments(module) if tables == "inputs" else None
    program = decomposed(module, images, dynamic, arguments)
    try:
        with quiet():
            made = torch.onnx.export(
                program,
                input_names=["images", *(arguments or ())],
                output_names=DETAILS if module.details else DETAILS[:1],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedModelError(
            f"the model cannot be written as an ONNX graph: {first_line(error.__cause__ or error)}"
        ) from error
    assert made is not None
    model: Any = made.model
    _drop_unused(model)
    _narrow_channels(ir, model)
    _name_dimensions(ir, model, dynamic)
    require_free(model.graph.inputs[0].shape, dynamic)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    facts = _facts(manifest) | {"k": module.k, "unscaled": module.unscaled}
    if arguments is None:  # of another database, labels have other names
        facts["class_names"] = manifest["class_names"]
    model.metadata_props[METADATA] = json.dumps(facts)
    with staged(Path(path)) as path:
        ir.save(model, path, external_data=f"{path.name}.data" if tables == "external" else None)
        check_sizes(_running(onnxruntime, path, arguments or {}), module, images, dynamic)


def _running(onnxruntime: Any, path: Path, tables: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A graph's file as a function from images to maps."""

    @functools.cache
    def opened() -> Any:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        session = opened()
        given = {name: table.cpu().numpy() for name, table in tables.items()}
        if "channels" in given:
            given["channels"] = given["channels"].astype(np.int32)
        wanted = {entry.name for entry in session.get_inputs()}
        given = {name: array for name, array in given.items() if name in wanted}
        (maps,) = session.run(["maps"], {"images": images.cpu().numpy()} | given)
        return torch.from_numpy(maps)

    return run


def table_inputs(
    session: onnxruntime.InferenceSession, database: Database
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a database that a graph with ``tables="inputs"`` takes.

    Args:
        session: of the graph, whose input ``images`` is left to the caller.
        database: any of the model, layer and method that the graph was exported with.

    Returns:
        By input: ``table`` [N, D] and ``squares`` [N] float32 always; as the graph needs them
        ``channels`` [N, M] int32, ``weights`` [N, M] and ``offsets`` [N] float32, ``row_labels``
        [N], ``temperature`` [] float32, ``proxy_rows`` [N + 1] int64 and ``proxy_vectors``
        [classes + 1, C] float32.

    Raises:
        TypeError: not a database.
        ValueError: a graph that gcfast has not exported; rows without a scale for one that was
            exported with ``normalize=None``.
        ModelMismatchError: a database of another model, layer or method than the graph's, of
            pictures that were prepared otherwise, or with another number of channels a row or
            kind of labels.
    """
    if not isinstance(database, Database):
        raise TypeError(
            f"`database` must be a gcfast.Database, got {type(database).__name__}; "
            "gcfast.Database.open reads one"
        )
    known = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if known is None:
        raise ValueError("`session` must be of a graph that export_onnx has written")
    facts, own = json.loads(known), json.loads(json.dumps(_facts(database.manifest)))
    differs = difference(facts["fingerprint"], own["fingerprint"])
    if differs is None and outputs_differ(facts["fingerprint"], own["fingerprint"]):
        differs = "other outputs for the same images"
    for name in ("layer", "l2_normalize", "method", "preprocessing"):
        # What a database does not say of its pictures is for the caller to know.
        unsaid = name == "preprocessing" and not (facts[name] and own[name])
        if differs is None and facts[name] != own[name] and not unsaid:
            differs = f"{name} {own[name]!r}, not {facts[name]!r}"
    if differs is not None:
        raise ModelMismatchError(f"the database is not of the graph's model and method: {differs}")
    if facts["unscaled"]:
        database.require_scale()
    database.warn_of_mixing(facts["k"], stacklevel=3)
    tables = {
        "table": database.embeddings.float(),
        "channels": database.channels.int(),
        "weights": database.weights.float(),
        "offsets": database.offsets,
        "row_labels": database.labels,
    }
    tables["squares"] = ExactSearch(tables["table"]).squares
    wanted = {entry.name: entry.shape for entry in session.get_inputs() if entry.name != "images"}
    if "channels" in wanted and (M := tables["channels"].shape[1]) != wanted["channels"][1]:
        raise ModelMismatchError(
            f"the database is not of the graph's: {M} channels a row, not {wanted['channels'][1]}"
        )
    kinds = {entry.name: entry.type for entry in session.get_inputs()}
    if "row_labels" in kinds and (kinds["row_labels"] == "tensor(int64)") == (
        tables["row_labels"].is_floating_point()
    ):
        raise ModelMismatchError(
            "the database is not of the graph's: labels are real numbers in one, and classes in "
            "the other"
        )
    if "temperature" in wanted:
        tables["temperature"] = torch.tensor(temperature(database.embeddings, facts["k"]))
    if "proxy_rows" in wanted:
        proxies = proxies_of(database, torch.device("cpu"))
        assert proxies is not None
        proxies = proxies.of_rows(database.labels)
        assert proxies.rows is not None
        tables |= {"proxy_rows": proxies.rows, "proxy_vectors": proxies.vectors}
    return {name: np.asarray(tables[name]) for name in sorted(wanted)}


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a database and a graph must have in common."""
    method = manifest["settings"].get("method")
    return {
        "fingerprint": manifest["fingerprint"],
        "layer": manifest["layer"],
        "l2_normalize": manifest["settings"]["l2_normalize"],
        # Either of the two that keep channels will do.
        "method": {"gradcam++": "gradcam"}.get(method, method),
        # The folder of the pictures is one of this machine.
        "preprocessing": without_images(manifest.get("preprocessing")) or {},
    }


def _arguments(module: ExportedExplainer) -> dict[str, Tensor]:
    """The tables in float32, whatever the database is stored in."""
    tables = {name: getattr(module, name) for name in module.tables}
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in tables.items()}


def _drop_unused(model: Any) -> None:
    """Drop inputs that the graph does not read, which a runtime would ask for nevertheless."""
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def _narrow_channels(ir: Any, model: Any) -> None:
    """Keep channel ids in 32 bits, which are widened after the rows are gathered."""
    table = model.graph.initializers.get("channels")
    if table is None:
        table = next((value for value in model.graph.inputs if value.name == "channels"), None)
    if table is None:
        return
    if table.const_value is not None:
        numbers = table.const_value.numpy().astype(np.int32)
        table.const_value = ir.Tensor(numbers, name="channels")
    table.dtype = ir.DataType.INT32
    for node, _ in list(table.uses()):
        assert node.op_type == "Gather", node.op_type
        (rows,) = node.outputs
        wide = ir.node("Cast", [rows], {"to": ir.DataType.INT64})
        wide.outputs[0].dtype, wide.outputs[0].shape = ir.DataType.INT64, rows.shape
        rows.dtype = ir.DataType.INT32
        rows.replace_all_uses_with(wide.outputs[0])
        wide.replace_input_with(0, rows)
        model.graph.insert_after(node, wide)


def _name_dimensions(ir: Any, model: Any, dynamic: Collection[str]) -> None:
    """Call the dimensions that are free what they are, where PyTorch numbers them."""
    names: dict[str | None, str] = {}
    for value in model.graph.inputs:
        axes = {TABLE_AXES.get(str(value.name), ROWS)[0]: 0}
        if value.name == "images":
            axes = {name: AXES[name] for name in dynamic}
        for name, axis in axes.items():
            size = value.shape[axis] if value.shape else None
            if isinstance(size, ir.SymbolicDim):
                names[size.value] = name
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                text = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
                value.shape[axis] = ir.SymbolicDim(text)
