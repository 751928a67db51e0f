"""``gcfast build --ray`` and ``gcfast explain --ray``."""

import sys

import pytest
from cli_case import fails, run

from gcfast import Database
from gcfast.errors import MissingExtraError
from gcfast.ray import pool

MODEL = ("--model", "ray_case:model", "--workers", "0", "--batch-size", "8")


@pytest.mark.ray
@pytest.mark.usefixtures("on_ray")
def test_the_commands(pictures, tmp_path, capsys):
    from ray_case import same

    settings = ("--images", pictures, "--layer", "backbone", "--size", "16", "--channels", "5")
    for out, more in (("here", ()), ("ray", ("--ray",))):
        status, said, errors = run(
            capsys, "build", "--out", tmp_path / out, *settings, *MODEL, *more
        )
        assert status == 0, errors
        assert said.endswith("131 rows, 4 of 5 classes, layer backbone\n")
    assert "unreadable pictures, left out: 1 (class1/05.png: " in errors
    assert same(tmp_path / "here", tmp_path / "ray")

    explain = ("explain", pictures / "class1", "--database", tmp_path / "ray", *MODEL, "--ray")
    words = fails(capsys, *explain, "--out", tmp_path / "maps", "--alpha", "0.5")
    assert "`--alpha` must be left out with --ray" in words
    words = fails(capsys, *explain, "--out", tmp_path / "maps", "--force")
    assert "`--force` must be left out with --ray" in words
    status, said, errors = run(capsys, *explain, "--out", tmp_path / "maps")
    assert status == 0, errors
    assert said == f"{tmp_path / 'maps'}: 33 pictures, 33 of them in this run\n"
    assert "unreadable pictures, whose rows have an `error`: 1" in errors
    assert len(list((tmp_path / "maps").glob("part-*.parquet"))) == 1
    assert "--resume" in fails(capsys, *explain, "--out", tmp_path / "maps")
    status, said, _ = run(capsys, *explain, "--out", tmp_path / "maps", "--resume")
    assert (status, said) == (0, f"{tmp_path / 'maps'}: 33 pictures, 0 of them in this run\n")
    Database.open(tmp_path / "ray").relabel({"class2/00.png": "class3"})
    words = fails(capsys, *explain, "--out", tmp_path / "maps", "--resume")
    assert "`--out` must have results of the same database to be continued" in words


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"`pool` needs ray.*pip install 'gcfast\[ray\]'"):
        pool()
