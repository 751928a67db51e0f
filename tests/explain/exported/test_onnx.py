"""Explainer.export_onnx: graphs that ONNX Runtime runs as explain_batch does."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import AFFINE_HEADS, CHANNELS, OTHER_HEADS, Net, TokenNet, common, loader, pictures

import gcfast.explain.exported.onnx as exported
from gcfast import BEST, Explainer, RankLoss, TokenGrid
from gcfast.errors import MissingExtraError, ModelMismatchError, UnsupportedModelError
from gcfast.explain.exported.onnx import DETAILS, table_inputs

GRADIENTS = {"channels": 4, "triplets": 5}


def made(model, count=30, **settings):
    explainer = Explainer(model.eval(), **settings)
    explainer.build(loader(*pictures(count)))
    explainer.explain_batch(pictures(2)[0])  # finds what refines
    return explainer


def session(path):
    return onnxruntime.InferenceSession(path)


def check(run, explainer, images, tables=None, **options):
    wanted = explainer.explain_batch(images, details=True, **options)
    got = run.run(None, {"images": images.numpy()} | (tables or {}))
    names = [output.name for output in run.get_outputs()]
    for name, array in zip(names, got, strict=True):
        other = getattr(wanted, name)
        assert tuple(array.shape) == tuple(other.shape)
        torch.testing.assert_close(torch.from_numpy(array), other, atol=1e-5, rtol=1e-5)
    return names


def initializers(path):
    graph = onnx.load(path, load_external_data=False).graph
    return {entry.name: entry for entry in graph.initializer}


def test_any_batch_and_sides_with_three_neighbors(tmp_path):
    path = tmp_path / "net.onnx"
    explainer = made(common(norm=True), k=3, **GRADIENTS)
    explainer.export_onnx(
        path, dynamic=("batch", "height", "width"), details=True, center=1.0, normalize="minmax"
    )
    run = session(path)
    (images,) = run.get_inputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, "height", "width"])
    for count, size in ((5, (8, 8)), (1, (8, 8)), (3, (12, 18))):
        images = pictures(count, size=size)[0]
        assert check(run, explainer, images, center=1.0, normalize="minmax") == list(DETAILS)
    assert initializers(path)["channels"].data_type == onnx.TensorProto.INT32
    assert b"networks.py" not in path.read_bytes()


def test_one_graph_for_every_database_of_a_model(tmp_path):
    path = tmp_path / "net.onnx"
    model = common()
    explainers = [made(model, count, **BEST) for count in (30, 50, 6)]
    explainers[0].export_onnx(path, tables="inputs", details=True)
    run = session(path)
    # Labels are those of the database that is given.
    assert "class_names" not in json.loads(run.get_modelmeta().custom_metadata_map["gcfast"])
    names = {entry.name for entry in run.get_inputs()} - {"images"}
    assert names == {"table", "squares", "row_labels", "proxy_rows", "proxy_vectors"}
    assert not names & set(initializers(path))
    for explainer in explainers:
        check(run, explainer, pictures(4)[0], table_inputs(run, explainer.database))
    other = made(common(), **BEST)
    with pytest.raises(ModelMismatchError, match=r"not of the graph's .*: other parameters"):
        table_inputs(run, other.database)
    rows = made(model, **GRADIENTS)
    with pytest.raises(ModelMismatchError, match="method 'gradcam', not 'proxy'"):
        table_inputs(run, rows.database)


class Graph:
    """What table_inputs reads of a session, of a graph made with this database."""

    def __init__(self, database, **facts):
        facts = exported._facts(database.manifest) | {"k": 1, "unscaled": False} | facts
        self.custom_metadata_map = {exported.METADATA: json.dumps(facts)}

    def get_modelmeta(self):
        return self

    def get_inputs(self):
        return [SimpleNamespace(name="row_labels", shape=["rows"], type="tensor(int64)")]


def test_tables_of_another_use_of_the_model():
    model = Switched().eval()
    images, labels = pictures(30)
    one = Explainer(model, "net.backbone", **GRADIENTS)
    prepared = {"size": 8, "images": "/somewhere"}
    graph = Graph(one.build(loader(images, labels), preprocessing=prepared))
    assert "somewhere" not in graph.custom_metadata_map[exported.METADATA]

    def tables(labels=labels, **options):
        other = Explainer(model, "net.backbone", **(GRADIENTS | options.pop("settings", {})))
        return table_inputs(graph, other.build(loader(images, labels), **options))

    assert set(tables(preprocessing=prepared | {"images": "elsewhere"})) == {"row_labels"}
    assert set(tables()) == {"row_labels"}
    with pytest.raises(ModelMismatchError, match=r"preprocessing \{'size': 9\}, not \{'size': 8\}"):
        tables(preprocessing={"size": 9})
    real = {"objective": RankLoss(torch.nn.Linear(6, 2))}
    with pytest.raises(ModelMismatchError, match="labels are real numbers in one, and classes in"):
        tables(labels + 0.5, settings=real)
    model.flips = True
    with pytest.raises(ModelMismatchError, match="other outputs for the same images"):
        tables()


class Switched(torch.nn.Module):
    """A network whose outputs a flag changes."""

    def __init__(self):
        super().__init__()
        self.net, self.flips = common(), False

    def forward(self, images):
        return self.net(images.flip(1) if self.flips else images)


def test_tables_that_do_not_fit_the_graph(tmp_path):
    path = tmp_path / "net.onnx"
    model = common()
    explainer = made(model, k=2, **GRADIENTS)
    explainer.export_onnx(path, tables="inputs", normalize=None)
    run = session(path)
    fewer = made(model, channels=3, triplets=5)
    with pytest.raises(ModelMismatchError, match="3 channels a row, not 4"):
        table_inputs(run, fewer.database)
    images, labels = pictures(30)
    units = torch.nn.functional.normalize(explainer.network.embed(images).output)
    given = Explainer(model, **GRADIENTS)
    given.build_from_embeddings(units, labels, sample=images, check=(images[:4], range(4)))
    with pytest.raises(ValueError, match="`normalize` must be 'max' or 'minmax' with this"):
        table_inputs(run, given.database)
    explainer.export_onnx(path, tables="inputs")
    with pytest.warns(UserWarning, match="no scale of their own: with k=2"):
        table_inputs(session(path), given.database)


@pytest.mark.slow
def test_tables_of_gradients_as_inputs(tmp_path):
    path = tmp_path / "net.onnx"
    model = common()
    explainers = [made(model, count, k=3, **GRADIENTS) for count in (30, 50, 6)]
    explainers[0].export_onnx(path, tables="inputs", center=1.0)
    run = session(path)
    for explainer in explainers:
        tables = table_inputs(run, explainer.database)
        assert set(tables) == {"table", "squares", "channels", "weights", "offsets", "temperature"}
        assert tables["channels"].dtype == np.int32
        assert check(run, explainer, pictures(4)[0], tables, center=1.0) == ["maps"]


@pytest.mark.slow
def test_the_lower_of_equal_rows(tmp_path):
    # Twins of one picture, more than the candidates that are measured again.
    path = tmp_path / "net.onnx"
    images, labels = pictures(40)
    twins = torch.arange(3, 38, 3)
    images[twins] = images[3].clone()
    explainer = Explainer(common().eval(), k=2, **GRADIENTS)
    explainer.build(loader(images, labels))
    explainer.export_onnx(path, details=True)
    run = session(path)
    check(run, explainer, images[[3, 30, 5]])
    got = run.run(["neighbors"], {"images": images[[3, 30]].numpy()})[0]
    assert got.tolist() == [[3, 6], [3, 6]]


@pytest.mark.slow
def test_external_data(tmp_path):
    path = tmp_path / "net.onnx"
    explainer = made(common(), **GRADIENTS)
    explainer.export_onnx(path, tables="external", relu=False, size=(5, 7))
    kept = initializers(path)["channels"]
    assert kept.data_location == onnx.TensorProto.EXTERNAL
    assert (tmp_path / "net.onnx.data").stat().st_size > 0
    check(session(path), explainer, pictures(4)[0], relu=False, size=(5, 7))


def test_a_failure_leaves_the_old_graph(tmp_path, monkeypatch):
    import onnx_ir

    path = tmp_path / "graph.onnx"
    explainer = made(common(), **GRADIENTS)
    explainer.export_onnx(path)
    before, save = path.read_bytes(), onnx_ir.save

    def cut(model, to, **options):
        save(model, to, **options)
        to.write_bytes(to.read_bytes()[:100])
        raise OSError("no space")

    monkeypatch.setattr(onnx_ir, "save", cut)
    with pytest.raises(OSError, match="no space"):
        explainer.export_onnx(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_no_old_graph_with_new_data(tmp_path, monkeypatch):
    path = tmp_path / "graph.onnx"
    made(common(), **GRADIENTS).export_onnx(path, tables="external")
    replace = os.replace

    def stop(source, target):
        if os.fspath(target) == os.fspath(path):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        made(common(), 31, **GRADIENTS).export_onnx(path, tables="external")
    assert os.listdir(tmp_path) == [f"{path.name}.data"]


@pytest.mark.slow
def test_a_transformer(tmp_path):
    path = tmp_path / "net.onnx"
    explainer = made(TokenNet(), layer="first", reshape=TokenGrid(prefix=1), **GRADIENTS)
    # The attention of this model takes the number of images as a constant.
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be exported with dynamic=\('batch',\)"
    ):
        explainer.export_onnx(path)
    images = pictures(4)[0]
    explainer.export_onnx(path, images=images, dynamic=(), details=True)
    check(session(path), explainer, images)


@pytest.mark.slow
def test_a_database_in_float16_and_another_head(tmp_path):
    path = tmp_path / "net.onnx"
    explainer = Explainer(Net(AFFINE_HEADS["bn neck"](CHANNELS)).eval(), **GRADIENTS)
    explainer.build(loader(*pictures(30)), out=tmp_path / "db", storage="float16")
    for tables in ("inside", "inputs"):
        explainer.export_onnx(path, tables=tables)
        run = session(path)
        given = table_inputs(run, explainer.database)
        assert bool(given) == (tables == "inputs")
        check(run, explainer, pictures(3)[0], given)


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    explainer = made(common(), **GRADIENTS)
    with pytest.raises(ValueError, match="`tables` must be one of"):
        explainer.export_onnx(path, tables="beside")
    with pytest.raises(TypeError, match=r"`dynamic` must be a tuple of names, got 'batch'"):
        explainer.export_onnx(path, dynamic="batch")
    with pytest.raises(ValueError, match="`dynamic` must be one of"):
        explainer.export_onnx(path, dynamic=("depth",))
    fresh = Explainer(explainer.network.model, database=explainer.database)
    with pytest.raises(ValueError, match="`images` must be given before the first pass"):
        fresh.export_onnx(path)
    with pytest.raises(ValueError, match=r"`path` must end with \.pt2"):
        explainer.export_aoti(path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"`export_onnx` needs onnxscript.*gcfast\[onnx\]"):
        explainer.export_onnx(path)
    assert not path.exists()


def test_more_than_one_file_holds(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    explainer = made(common(), **GRADIENTS)
    monkeypatch.setattr(exported, "PROTOBUF_BYTES", exported.ROOM_BYTES + 1000)
    with pytest.raises(ValueError, match=r"`tables` must be 'external' for [\d,]+ bytes"):
        explainer.export_onnx(path)
    assert not path.exists()


class Odd(torch.nn.Module):
    """An operation that ONNX has not."""

    def forward(self, maps):
        return torch.special.i1e(maps.mean((2, 3)))


def test_an_operation_that_onnx_has_not(tmp_path):
    explainer = made(Net(Odd()), **GRADIENTS)
    with pytest.raises(UnsupportedModelError, match=r"written as an ONNX graph: .*bessel_i1e"):
        explainer.export_onnx(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pool_that_is_cut_up_by_the_size(tmp_path):
    path = tmp_path / "net.onnx"
    explainer = Explainer(Net(OTHER_HEADS["flatten"](CHANNELS)).eval(), **GRADIENTS)
    images, labels = pictures(30, size=(30, 30))
    explainer.build(loader(images, labels))
    explainer.explain_batch(images[:2])
    with pytest.warns(UserWarning, match=r"images of .*, and others for .*: what the model does"):
        explainer.export_onnx(path, dynamic=("batch", "height", "width"))
    explainer.export_onnx(path)
    check(session(path), explainer, images[:3])


def test_a_graph_of_others(tmp_path):
    path = tmp_path / "other.onnx"
    value = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    with pytest.raises(ValueError, match="of a graph that export_onnx has written"):
        table_inputs(session(path), made(common(), **GRADIENTS).database)
    with pytest.raises(TypeError, match=r"`database` must be a gcfast.Database, got str; gcf"):
        table_inputs(session(path), "birds.gcfast")
