"""`gcfast export`: a graph that gives what `gcfast explain` gives."""

import json
import os
import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from cli_case import fails, run

import gcfast
from gcfast.images.preprocessing import Preprocessing

GIVEN = ("export", "--database", "db", "--model", "cli_net:build")


def test_a_graph(here, capsys, tmp_path):
    out = tmp_path / "net.onnx"
    status, told, err = run(
        capsys, *GIVEN, "--out", out, "--details", "--center", "1", "--dynamic", "batch", "height"
    )
    assert (status, told) == (
        0,
        f"{out}: images [batch, 3, height, 32], {out.stat().st_size:,} bytes\n",
    )
    assert "pictures have to be prepared so: 32 x 32" in err
    session = onnxruntime.InferenceSession(out)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["gcfast"])
    assert facts["class_names"] == ["blue", "green", "red"]
    assert Preprocessing.from_dict(facts["preprocessing"]).shape == (32, 32)
    assert os.fspath(here) not in json.dumps(facts)

    sys.path.insert(0, os.fspath(here))
    try:
        import cli_net
    finally:
        sys.path.remove(os.fspath(here))
    explainer = gcfast.load("db", cli_net.build().eval(), refine="auto")
    for height in (32, 48):
        images = torch.randn(3, 3, height, 32)
        wanted = explainer.explain_batch(images, center=1.0, details=True)
        maps, neighbors = session.run(["maps", "neighbors"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(maps), wanted.maps, atol=1e-5, rtol=1e-5)
        assert neighbors.tolist() == wanted.neighbors.tolist()
    assert fails(capsys, *GIVEN, "--out", out) == (
        f"gcfast: `--out` must be new, {out} exists; --force replaces it"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--out", "net.tflite"), "`--out` must end with .onnx or .pt2, got net.tflite"),
        (
            ("--out", "net.pt2", "--tables", "inputs"),
            "`--tables` must be inside for a .pt2, got inputs",
        ),
        (("--out", "net.onnx", "--batch-size", "0"), "`--batch-size` must be at least 1, got 0"),
        (
            ("--out", "no/net.pt2"),
            "`--out` must lie in a folder that is there, got no/net.pt2",
        ),
        (
            ("--out", "net.onnx", "--tables", "external"),
            "`--out` must be new, net.onnx.data exists; --force replaces it",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_refused(capsys, more, words):
    Path("net.onnx.data").touch()
    assert fails(capsys, *GIVEN, *more) == f"gcfast: {words}"


@pytest.mark.usefixtures("here")
def test_pictures_prepared_in_a_way_that_is_not_ours(capsys, tmp_path):
    folder = shutil.copytree("db", tmp_path / "db")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"preprocessing": 224}))
    said = fails(
        capsys, "export", "--database", folder, "--model", "cli_net:build", "--out", "net.pt2"
    )
    assert said.startswith("gcfast: `--database` must say how its pictures were prepared, and was")
