"""The log: events with facts, written where a program or the command line asks for it."""

import json
import logging
import sys

import pytest
from cli_case import SETTINGS, VIEW, prepare, run
from networks import common, loader, pictures

from gcfast import Explainer
from gcfast._log import JsonLines, tell, told, written


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def kept():
    logger, handler = logging.getLogger("gcfast"), Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def events(records):
    return [record.facts["event"] for record in records]


def test_a_build_from_beginning_to_end(kept, tmp_path):
    explainer = Explainer(common().eval(), channels=4, triplets=5)
    images, labels = pictures(12)
    labels[0] = 9  # a label seen once
    explainer.build(loader(images, labels), out=tmp_path / "db")
    found = events(kept)
    assert (found[0], found[-1]) == ("build begins", "build ended")
    parts = [
        f"{what} {how}" for what in ("embedding", "making rows") for how in ("begins", "ended")
    ]
    assert [event for event in found[1:-1] if event != "shard written"] == parts
    assert found.count("shard written") == 1
    end = kept[-1]
    assert end.name == "gcfast.build"
    assert (end.facts["images"], end.facts["rows"], end.facts["skipped_single"]) == (12, 11, 1)
    assert end.getMessage().startswith("build ended: layer=backbone")
    shard = next(r for r in kept if r.facts["event"] == "shard written")
    assert (shard.facts["file"], shard.facts["rows"]) == ("rows-00000.safetensors", 11)


def test_a_build_that_fails(kept):
    explainer = Explainer(common().eval(), channels=13)
    with pytest.raises(ValueError, match="`channels` must be at most"):
        explainer.build(loader(*pictures(4)))
    assert kept[-1].levelname == "ERROR"
    assert kept[-1].facts["event"] == "build failed"
    assert kept[-1].facts["error"].startswith("ValueError: ")


def test_nothing_without_a_handler(capfd):
    with told("build", "build") as found:
        found["rows"] = 3
    tell("build", "went wrong", logging.ERROR)  # without a handler, `logging` would print this
    assert capfd.readouterr() == ("", "")


def test_lines_of_json(tmp_path, capfd):
    path = tmp_path / "log.jsonl"
    with written(None, path):
        tell("build", "shard written", file="é", rows=2)
        logging.getLogger("gcfast.serve").warning("slow: %d ms", 12)
    tell("build", "not written")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00"] * 2
    assert lines == [
        {
            "level": "info",
            "logger": "gcfast.build",
            "event": "shard written",
            "file": "é",
            "rows": 2,
        },
        {"level": "warning", "logger": "gcfast.serve", "event": "slow: 12 ms"},
    ]
    assert capfd.readouterr().err == ""


def test_lines_on_standard_error_come_once(capsys):
    root = Kept()
    logging.getLogger().addHandler(root)
    try:
        with written("warning"):
            tell("build", "told", logging.WARNING, rows=1)
            tell("build", "not told")
    finally:
        logging.getLogger().removeHandler(root)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("WARNING gcfast.build: told: rows=1")
    assert root.records == []


def test_a_line_is_one_line_of_any_text(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with (
        written("info", path),
        pytest.raises(ValueError, match="first"),
        told("build", "build", out="caf\udce9"),  # a name that is not UTF-8
    ):
        raise ValueError("first\nsecond")
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [line["event"] for line in lines] == ["build begins", "build failed"]
    assert lines[0]["out"] == "caf\udce9"
    assert lines[1]["error"] == "ValueError: first\nsecond"
    begins, failed = capsys.readouterr().err.splitlines()
    assert begins.endswith("INFO gcfast.build: build begins: out=caf\\udce9")
    assert failed.endswith("error=ValueError: first second")


def test_an_exception_is_in_the_json():
    try:
        raise RuntimeError("so")
    except RuntimeError:
        record = logging.getLogger("gcfast").makeRecord(
            "gcfast", logging.ERROR, "", 0, "failed", (), sys.exc_info()
        )
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["level"]) == ("failed", "error")
    assert "RuntimeError: so" in line["traceback"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    here = prepare(tmp_path)
    monkeypatch.chdir(here)
    status, _, err = run(
        capsys, "build", "--images", "pictures", "--out", "other", *SETTINGS, *VIEW,
        "--log-level", "info", "--log-json", "log.jsonl",
    )  # fmt: skip
    assert status == 0
    assert "INFO gcfast.build: build begins: method=gradcam, out=other" in err
    written_lines = (here / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines = {line["event"]: line for line in map(json.loads, written_lines)}
    assert lines["build ended"]["rows"] == 18
    assert lines["unreadable pictures, skipped"]["count"] == 1
    (handler,) = logging.getLogger("gcfast").handlers
    assert type(handler) is logging.NullHandler
