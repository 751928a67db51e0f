"""What tells one model from another."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from networks import AFFINE_HEADS, CHANNELS, Net, common
from torch import Tensor, nn

from gcfast.errors import ModelMismatchError
from gcfast.model import fingerprint as fingerprint_module
from gcfast.model.fingerprint import check_model, difference, fingerprint, with_outputs
from gcfast.model.network import Network


def test_a_copy_has_the_same_fingerprint() -> None:
    model = common(norm=True)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)
    assert difference(fingerprint(model), fingerprint(copy.deepcopy(model))) is None


@pytest.mark.cuda
@pytest.mark.parametrize("size", [1, 100, 2**23])
def test_a_gpu_gives_the_same(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    model = common(norm=True).half()
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("none", torch.zeros(0))
    before = fingerprint(model)
    monkeypatch.setattr(fingerprint_module, "COPIED_BYTES", size)
    assert fingerprint(model.to(gpu)) == before


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


def test_another_shape_changes_the_architecture() -> None:
    other = Net(AFFINE_HEADS["no bias"](CHANNELS))
    assert difference(fingerprint(common()), fingerprint(other)) == "another architecture"


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


# --- what a model makes of fixed images


def stored_of(model: nn.Module) -> dict[str, Any]:
    network = Network(model)
    network.embed(torch.rand(2, 3, 8, 8))
    stored = with_outputs(fingerprint(model), network)
    return json.loads(json.dumps(stored))  # as a manifest has it


def refused(stored: dict[str, Any], model: nn.Module, words: str) -> None:
    with pytest.raises(ModelMismatchError, match=f"the database was built with another .*{words}"):
        check_model(stored, Network(model))


def test_the_same_model_is_taken() -> None:
    model = common(norm=True).eval()
    check_model(stored_of(model), Network(copy.deepcopy(model)))
    longer = Net(nn.Sequential(*model.head, nn.Identity()))
    longer.backbone = model.backbone
    check_model(stored_of(model), Network(longer))


def test_other_parameters_are_refused_however_alike() -> None:
    model = common(norm=True).eval()
    stored = stored_of(model)
    with torch.no_grad():
        model.head[1].bias[0] += 1e-4
    refused(stored, model, "other parameters")
    refused(stored, Net(AFFINE_HEADS["no bias"](CHANNELS)), "another architecture")


def test_a_buffer_that_says_nothing_is_no_other_model() -> None:
    class Counting(Net):
        def __init__(self, head: nn.Module) -> None:
            super().__init__(head)
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("cache", torch.zeros(1), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            self.seen += len(images)
            self.cache = torch.zeros(images.shape[-2:])
            return super().forward(images)

    model = Counting(AFFINE_HEADS["linear"](CHANNELS)).eval()
    stored = stored_of(model)
    model(torch.rand(3, 3, 8, 8))
    check_model(stored, Network(model))


def test_a_running_mean_is_another_model() -> None:
    model = common(norm=True).eval()
    stored = stored_of(model)
    model.backbone.norm.running_mean += 1
    refused(stored, model, "other parameters; its embeddings of fixed images differ by")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_a_copy_in_another_precision_is_taken_with_a_warning(dtype: torch.dtype) -> None:
    model = common(norm=True).eval()
    stored = stored_of(model)
    half = copy.deepcopy(model).to(dtype)
    with pytest.warns(UserWarning, match="built with the model in float32, and this one is in"):
        check_model(stored, Network(half))
    with torch.no_grad():
        half.head[1].weight.neg_()
    refused(stored, half, "a conversion rounds them.*; its embeddings of fixed images differ by")


def test_a_flag_that_changes_the_outputs_is_another_model() -> None:
    class Flagged(Net):
        sign = 1

        def forward(self, images: Tensor) -> Tensor:
            return self.sign * super().forward(images)

    model = Flagged(AFFINE_HEADS["linear"](CHANNELS)).eval()
    stored = stored_of(model)
    model.sign = -1
    refused(stored, model, "the same parameters, but a switch, a flag or an adapter")


def test_images_that_fail_in_a_model_are_told() -> None:
    model = common().half().eval()
    network = Network(model)
    network.image_shape = (3, 8, 8)
    stored = with_outputs(fingerprint(model), network) | {"images": [4, 8, 8]}
    refused(stored, model, r"images of \[4, 8, 8\] fail in it")


def test_many_outputs_are_projected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 200, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    stored = stored_of(model)
    assert [len(numbers) for numbers in stored["outputs"]] == [64, 64]
    check_model(stored, Network(model))


def test_a_fingerprint_of_version_1_counts_every_buffer_and_class() -> None:
    model = common(norm=True)
    check_model(fingerprint_module._version_1(model), Network(model))
    with torch.no_grad():
        model.backbone.norm.num_batches_tracked += 1
    refused({**fingerprint_module._version_1(common(norm=True))}, model, "other parameters")
