"""What tells one model from another."""

from __future__ import annotations

import copy

import torch
from networks import AFFINE_HEADS, CHANNELS, Net, common
from torch import nn

from gcfast.model.fingerprint import difference, fingerprint


def test_a_copy_has_the_same_fingerprint() -> None:
    model = common(norm=True)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)
    assert difference(fingerprint(model), fingerprint(copy.deepcopy(model))) is None


def test_wrappers_do_not_change_it() -> None:
    model = common()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert fingerprint(wrapped) == fingerprint(model)


def test_mode_layout_and_gradients_do_not_change_it() -> None:
    model = common()
    before = fingerprint(model)
    model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    assert fingerprint(model) == before


def test_one_value_changes_the_parameters() -> None:
    model = common(norm=True)
    for change in (model.head[1].bias, model.backbone.norm.running_mean):
        before = fingerprint(model)
        with torch.no_grad():
            change[0] += 1
        after = fingerprint(model)
        assert difference(before, after) == "other parameters"
        assert after["architecture"] == before["architecture"]


def test_a_module_more_changes_the_architecture() -> None:
    model = common()
    longer = Net(nn.Sequential(*model.head, nn.Identity()))
    longer.backbone = model.backbone
    assert difference(fingerprint(model), fingerprint(longer)) == "another architecture"
    other = Net(AFFINE_HEADS["no bias"](CHANNELS))
    assert difference(fingerprint(model), fingerprint(other)) == "another architecture"


def test_a_precision_that_loses_nothing_is_the_same_model() -> None:
    model = common().half()
    wide = copy.deepcopy(model).float()
    assert fingerprint(model)["parameters"] == fingerprint(wide)["parameters"]
    assert fingerprint(model)["dtype"] == "float16"
    assert difference(fingerprint(model), fingerprint(wide)) is None


def test_a_conversion_that_rounds_is_named() -> None:
    model = common()
    half = copy.deepcopy(model).half()
    words = difference(fingerprint(model), fingerprint(half))
    assert words == (
        "other parameters (stored as float32, the model's are float16: a conversion rounds them)"
    )


def test_empty_and_scalar_and_integer_tensors() -> None:
    model = nn.Module()
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("none", torch.zeros(0))
    model.register_buffer("mask", torch.tensor([True, False]))
    first = fingerprint(model)
    model.steps += 1
    assert difference(first, fingerprint(model)) == "other parameters"
