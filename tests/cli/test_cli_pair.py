"""`gcfast pair`, end to end on small pictures and a small network."""

import json
import re

import numpy as np
import pytest
import torch
from cli_case import SETTINGS, fails, run
from PIL import Image

import gcfast
from gcfast.cli.direct.alike import Alike
from gcfast.cli.direct.drawn import seen
from gcfast.cli.direct.pair import _facts
from gcfast.images.preprocessing import Preprocessing

ONE, TWO, THIRD = "pictures/red/0.png", "pictures/red/3.png", "pictures/blue/0.png"
ALONE = ("--model", "cli_net:build", "--size", "32")


def pair(capsys, out, *more):
    status, told, err = run(capsys, "pair", ONE, TWO, "--out", out, *more)
    assert status == 0, err
    return told, np.load(out / "pair.npz"), (out / "index.html").read_text()


def library(**options):
    import cli_net

    one, two, third = (seen(path, Preprocessing(32)).images for path in (ONE, TWO, THIRD))
    explainer = gcfast.Explainer(cli_net.build(), refine="auto")
    options = {name: third if value == THIRD else value for name, value in options.items()}
    return explainer.explain_pair(one, two, correspondence=True, **options)


@pytest.mark.usefixtures("here")
def test_pair_equals_the_library(capsys, tmp_path):
    told, arrays, page = pair(capsys, tmp_path / "a", *ALONE)
    why = library()
    assert told == f"{tmp_path / 'a' / 'index.html'}: cosine {float(why.similarity):.4f}\n"
    assert sorted(arrays) == sorted(why._fields)
    for name, values in why._asdict().items():
        np.testing.assert_allclose(arrays[name], values[0], atol=1e-5)
    for name in ("query", "match"):
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            assert picture.size == (48, 40)
    assert page.count("<img ") == 4
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_what_rounds_to_zero_has_no_sign():
    zero = torch.tensor([-1e-9])
    why = gcfast.PairMaps(zero, zero, zero, zero, zero, zero, zero)
    for against in ("none", "mean"):
        assert not any("-0" in value for _, value in _facts(Alike((), why, ()), against))


@pytest.mark.usefixtures("here")
def test_pair_told_from_a_third_picture_and_from_what_all_share(capsys, tmp_path):
    _, arrays, page = pair(capsys, tmp_path / "a", *ALONE, "--unlike", THIRD)
    np.testing.assert_allclose(arrays["query"], library(unlike=THIRD).query[0], atol=1e-5)
    assert f"its share of the cosine with {THIRD}" in page
    database = ("--database", "db", *SETTINGS[:2])
    mean = torch.nn.functional.normalize(gcfast.Database.open("db").embeddings, dim=1).mean(0)
    wanted = library(unlike=mean).query[0]
    _, arrays, page = pair(capsys, tmp_path / "b", *database)
    np.testing.assert_allclose(arrays["query"], wanted, atol=1e-5)
    assert "in common with the database" in page
    _, arrays, _ = pair(capsys, tmp_path / "c", *database, "--unlike", "none")
    np.testing.assert_allclose(arrays["query"], library().query[0], atol=1e-5)


@pytest.mark.usefixtures("here")
def test_pair_without_linked_places(capsys, tmp_path):
    _, arrays, page = pair(capsys, tmp_path, *ALONE, "--no-places")
    assert "correspondence" not in arrays
    assert "<script" not in page
    assert "data-linked" not in page


@pytest.mark.usefixtures("here")
def test_pair_errors(capsys, tmp_path):
    def refused(*more, match=TWO):
        return fails(capsys, "pair", ONE, match, "--out", tmp_path / "out", *more)

    assert "cannot read nowhere.png: FileNotFoundError" in refused(*ALONE, match="nowhere.png")
    assert "cannot read pictures/red/broken.png" in refused(*ALONE, match="pictures/red/broken.png")
    assert '`--unlike` must be a picture or "none" without --database' in refused(
        *ALONE, "--unlike", "mean"
    )
    assert "`--size` must be left out with --database" in refused(*ALONE, "--database", "db")
    assert "`--layer` must be left out with --database" in refused(
        *SETTINGS[:2], "--database", "db", "--layer", "features"
    )
    assert "`--alpha` must be in [0, 1], got 3.0" in refused(*ALONE, "--alpha", "3")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_pages_of_explain_link_a_picture_with_its_nearest(capsys, tmp_path):
    base = ("explain", "--database", "db", *SETTINGS, "pictures/green", "--out")
    status, _, err = run(capsys, *base, tmp_path / "a", "--linked", "2")
    assert status == 0, err
    page = (tmp_path / "a" / "index.html").read_text()
    assert page.count("alike, here") == page.count("alike, there") == 2 * 6  # with the captions
    linked = re.findall(r'data-linked="([^"]*)"', page)
    assert len(linked) == 2
    for text in linked:
        found = json.loads(text.replace("&#34;", '"'))
        assert found["grids"] == [[8, 8], [8, 8]]
        assert found["shares"] == [[1.0, 1.0], [1.0, 1.0]]
    status, _, _ = run(capsys, *base, tmp_path / "b", "--linked", "0")
    assert status == 0
    assert "<script" not in (tmp_path / "b" / "index.html").read_text()
    for option in (("--layer", "features"), ("--mean", "0", "0", "0")):
        assert f"`{option[0]}` must be left out with --database" in fails(
            capsys, *base, tmp_path / "c", *option
        )
    assert "`--neutral` must be left out without --text" in fails(
        capsys, *base, tmp_path / "c", "--neutral", "a"
    )
    assert "`--database` must be given, unless --text" in fails(
        capsys, "explain", *SETTINGS, "pictures/green", "--out", tmp_path / "c"
    )
