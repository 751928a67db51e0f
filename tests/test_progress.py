"""Bars on a terminal, lines in a file."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from networks import common, pictures

import gcfast
from gcfast import _progress
from gcfast._progress import Progress, length, tracked


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have gone; a test moves them."""
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in tracked(range(960), "embedding", "batches", show=True):
        clock[0] += 0.125
    assert capsys.readouterr().err.splitlines() == [
        f"embedding: {done} of 960 batches in {gone}, {left} left"
        for done, gone, left in (
            (240, "00:30", "01:30"),
            (480, "01:00", "01:00"),
            (720, "01:30", "00:30"),
            (960, "02:00", "00:00"),
        )
    ]


def test_what_has_no_length_is_counted(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert length(iter([1])) is None
    with Progress("embedding", "batches", total=None, show=True) as progress:
        clock[0] = 3700
        progress.update(5)
    assert capsys.readouterr().err == "embedding: 5 batches in 1:01:40\n"


def test_a_terminal_gets_a_bar_with_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(tracked([1, 2, 3], "k-means", "databases", show=True)) == [1, 2, 3]
    assert "k-means:   0%" in screen.getvalue()
    assert "0/3" in screen.getvalue()


def test_nothing_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(tracked([1, 2, 3], "k-means", "databases", show=False)) == [1, 2, 3]
    assert screen.getvalue() == ""


def test_every_stage_of_a_build_has_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(12)
    loader = list(zip(images.split(4), labels.split(4), strict=True))
    held_out = [(torch.rand(12, 3, *images.shape[2:]), labels)]
    one = gcfast.Explainer(common(), "backbone", channels=5)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    one.build(loader, progress=True)
    one.calibrate(held_out, progress=True)
    for shown in ("embedding:   0%", "0/3", "making rows:   0%", "0/12", "comparing maps:", "0/1"):
        assert shown in screen.getvalue()
