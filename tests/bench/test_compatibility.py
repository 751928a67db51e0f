"""The table of networks that were tried, made in small."""

from __future__ import annotations

import json

import compatibility
import pytest
import torch
from compatibility import Head, Siamese, Stripes, Subject, average
from torch import nn

import gcfast

SMALL = [
    Subject("heads", "average", lambda: Head(average()), (32, 32)),
    Subject("heads", "stripes", lambda: Head(Stripes()), (32, 32)),
    Subject("wrappers", "siamese", lambda: Siamese(Head(average())), (32, 32)),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few small networks in the place of all."""
    monkeypatch.setattr(compatibility, "subjects", lambda: (SMALL, ["big_subjects: no package"]))


def test_rows_are_written_and_kept(tmp_path, capsys):
    assert compatibility.main(["--out", str(tmp_path), "--only", "stripes"]) == 0
    page = (tmp_path / "compatibility.md").read_text()
    assert page.endswith("In the program and not run yet: average, siamese.\n")
    assert compatibility.main(["--out", str(tmp_path), "--only", "average", "siamese"]) == 0
    rows = json.loads((tmp_path / "compatibility.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["average", "stripes", "siamese"]
    assert [row["closed_form"] for row in rows] == [True, False, True]
    assert all(row["difference"] <= compatibility.TOLERANCE for row in rows)
    page = (tmp_path / "compatibility.md").read_text()
    assert "not run yet" not in page
    assert "| wrappers: siamese | `backbone.backbone` | [B, C, H, W] | 8 x 8 | yes |" in page
    assert "left out: big_subjects: no package" in capsys.readouterr().out


def test_a_wrong_map_and_an_error_fail(tmp_path, monkeypatch, capsys):
    true_map = compatibility.by_hand

    def other(explainer, *triplet):
        if isinstance(explainer.network.model.head, Stripes):
            raise RuntimeError("no such thing")
        return true_map(explainer, *triplet) + 0.5

    monkeypatch.setattr(compatibility, "by_hand", other)
    assert compatibility.main(["--out", str(tmp_path), "--only", "average", "stripes"]) == 1
    printed = capsys.readouterr().out
    assert "2 maps are not the right ones\n  heads: average\n  heads: stripes" in printed
    assert "| RuntimeError: no such thing |" in (tmp_path / "compatibility.md").read_text()


def test_every_network_has_a_name_of_its_own():
    names = [(one.group, one.name) for one in compatibility.own_subjects()]
    assert len(set(names)) == len(names)


def test_the_formula_is_that_of_a_head_by_hand():
    """On average pooling and a linear layer, where the gradient is known."""
    torch.manual_seed(0)
    model = Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16))).eval()
    explainer = gcfast.Explainer(
        model, "backbone", channels=compatibility.CHANNELS, objective=gcfast.DistanceDifference()
    )
    triplet = torch.rand(3, 1, 3, 32, 32)
    explainer.explain_triplet(*triplet)
    with torch.no_grad():
        maps = model.backbone(triplet[0])
        raw = model(triplet[:, 0])
        unit = raw / raw.norm(dim=1, keepdim=True)
        cotangent = 2 * (unit[2] - unit[1])
        cotangent = (cotangent - unit[0] * (cotangent @ unit[0])) / raw[0].norm()
        weights = -(cotangent @ model.head[2].weight) / maps[0, 0].numel()
        best = weights.topk(compatibility.CHANNELS).indices
        cam = (weights[best, None, None] * maps[0, best]).sum(0)
    got = compatibility.by_hand(explainer, *triplet)
    drawn = nn.functional.interpolate(
        (cam / cam.abs().max())[None, None], (32, 32), mode="bilinear"
    )
    torch.testing.assert_close(got, drawn[0], rtol=1e-4, atol=1e-5)
