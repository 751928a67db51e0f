"""The records of `bench/compress.py`: what is compared with what."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import common
from test_scenes import photographs, stand_ins

import gcfast

pytest.importorskip("faiss")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield importlib.import_module("compress")
    torch.set_num_threads(threads)


def record(compress: ModuleType, tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    compress.main([*arguments, "--iterations", "2", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    return {facts["database"]: facts for facts in found["results"]}


def check(found: dict[str, dict[str, Any]], rows: int, counts: list[int]) -> None:
    names = ["all rows"]
    for count in counts:
        names += [f"{count} centres", f"{count} random rows"]
    assert list(found) == names
    assert found["all rows"]["rows"] == rows
    assert found["all rows"]["cosine with all rows"] == pytest.approx(1, abs=1e-5)
    for count in counts:
        ours, control = found[f"{count} centres"], found[f"{count} random rows"]
        assert ours["rows"] == control["rows"] == count
        assert ours["seconds"] > 0
        assert 0 < ours["cosine with all rows"] < 1
        assert 0 < control["cosine with all rows"] < 1
        assert ours["row_bytes, folder_bytes"][0] < found["all rows"]["row_bytes, folder_bytes"][0]


@pytest.mark.slow
def test_the_demonstration(compress: ModuleType, tmp_path: Path) -> None:
    found = record(compress, tmp_path, "--demo", "--each", "5", "--unseen", "1", "--centers", "6")
    check(found, 27 * 5, [1, 6])
    assert {"box", "mask", "part"} < found["6 centres"].keys()


def test_the_scenes(compress: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package)
    scenes = importlib.import_module("scenes")
    stamps, grounds = stand_ins(scenes.sys.modules["scenes_compose"], 6), photographs()
    asked: list[Any] = []

    def compose_all(options: Any, _photographs: Any) -> tuple[Any, ...]:
        asked.append(options)
        return tuple(
            scenes.make_pictures(kind, stamps, classes, grounds, each=each, seed=0, size=64)
            for kind, classes, each in (("train", (0, 1, 2), 8), ("one", (3, 4), 2),
                                        ("two", (0, 1, 2), 6))
        )  # fmt: skip

    network = common(52)
    monkeypatch.setattr(scenes, "LAYER", "backbone")
    monkeypatch.setattr(scenes, "load_photographs", list)
    monkeypatch.setattr(scenes, "compose_all", compose_all)
    monkeypatch.setattr(scenes, "fine_tune", lambda *_: (network, []))
    found = record(
        compress, tmp_path, "--scenes", "--stamps", "there", "--threads", "1", "--centers", "2"
    )
    check(found, 24, [1, 2])
    assert asked[0].stamps == Path("there")
    # One row has one class, which is on two of three pictures with two of three classes.
    assert {"mask", "box", "share", "right"} < found["all rows"].keys()
    assert 0 < found["1 centres"]["nearest is of one of the two"] < 1
    # What `bench/scenes.py` gives for the whole database is the row of all rows.
    quality = importlib.import_module("scenes_quality")
    rows, one, two = compose_all(None, None)
    explainer = gcfast.Explainer(network, "backbone")
    measured = quality.measure(explainer, rows, one, two, seed=0, progress=False)
    main = dict(measured.tables[0.0].rows)[quality.MAIN_ROW]
    for column, value in main.items():
        assert found["all rows"][column] == pytest.approx(value, abs=1e-5)


def test_other_options_are_refused(
    compress: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compress.main(["--demo", "--stamps", "there"])
    assert "unrecognized arguments: --stamps there" in capsys.readouterr().err
