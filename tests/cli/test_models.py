"""Networks by name, and weights from files. The libraries themselves are stood in for."""

import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gcfast.cli.models import (
    ModelLoadError,
    load_model,
    load_weights,
    read_weights,
    strip_classifier,
)
from gcfast.errors import MissingExtraError
from gcfast.images.preprocessing import Preprocessing


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


# A function of the user's


def test_function_in_the_working_directory(here):
    (here / "nets").mkdir()
    (here / "nets" / "own.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(2, 3).train()\n"
    )
    loaded = load_model("nets.own:build")
    assert isinstance(loaded.module, nn.Linear)
    assert not loaded.module.training
    assert (loaded.output_key, loaded.preprocessing) == (None, None)


@pytest.mark.parametrize("spec", ["resnet50", "timm/", "/x", "keras/x", "a/b:c", ""])
def test_unknown_forms(spec):
    with pytest.raises(ValueError, match=r"`model` must be package.module:function, timm/NAME"):
        load_model(spec)


def test_function_errors(here):
    (here / "gcf_nets.py").write_text(
        "def resnet():\n    raise KeyError('x')\ndef text():\n    return 'no net'\n"
    )
    (here / "gcf_needs.py").write_text("import a_package_nobody_has\n")
    (here / "gcf_bad.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match="must name a module that can be imported, found no gcf_x"):
        load_model("gcf_x.y:f")
    with pytest.raises(
        ModelLoadError, match="importing gcf_needs failed: ModuleNotFoundError: No mo"
    ):
        load_model("gcf_needs:f")
    with pytest.raises(ModelLoadError, match="importing gcf_bad failed: SyntaxError"):
        load_model("gcf_bad:f")
    with pytest.raises(ValueError, match=r"it has no resnt \(but resnet\)"):
        load_model("gcf_nets:resnt")
    with pytest.raises(ModelLoadError, match=r"failed: KeyError: 'x' \(gcf_nets.py, line 2\)"):
        load_model("gcf_nets:resnet")
    with pytest.raises(TypeError, match=r"gcf_nets:text must return a torch.nn.Module, got str"):
        load_model("gcf_nets:text")


# Libraries


@pytest.mark.parametrize(
    ("spec", "package"),
    [("timm/a", "timm"), ("torchvision/a", "torchvision.models"), ("hf/a", "transformers")],
)
def test_missing_library_names_what_to_install(monkeypatch, spec, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"`{spec}` needs the package .*: pip install "):
        load_model(spec)


def test_library_that_does_not_fit_pytorch(here, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (here / "torchvision").mkdir()
    (here / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator nms')")
    sys.path.insert(0, str(here))
    with pytest.raises(MissingExtraError, match=r"does not work with PyTorch .*no operator nms"):
        load_model("torchvision/resnet18")


def test_timm(monkeypatch, tmp_path):
    calls = []

    def create_model(name, **settings):
        calls.append((name, settings))
        network = nn.Sequential(nn.Conv2d(3, 4, 3))
        network.pretrained_cfg = {
            "classifier": "head.fc",
            "input_size": (3, 96, 96),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.2, 0.2, 0.2),
        }
        return network

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    loaded = load_model("timm/tiny.in1k")
    assert calls == [("tiny.in1k", {"pretrained": True, "num_classes": 0})]
    # What the configuration leaves out is as in timm.data.resolve_data_config.
    assert loaded.preprocessing == Preprocessing(
        size=96, mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", crop_pct=0.875
    )

    # The checkpoint's classifier is not wanted, and no weights are fetched.
    source = nn.Sequential(nn.Conv2d(3, 4, 3))
    head = {"head.fc.weight": torch.ones(9, 4), "head.fc.bias": torch.ones(9)}
    save_file(source.state_dict() | head, tmp_path / "w.safetensors")
    loaded = load_model("timm/tiny.in1k", tmp_path / "w.safetensors")
    assert calls[1][1]["pretrained"] is False
    assert same(loaded.module, source)


def test_timm_name_that_does_not_exist(monkeypatch):
    def create_model(name, **_):
        raise RuntimeError(f"Unknown model ({name})")

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    with pytest.raises(ModelLoadError, match=r"timm/x failed: RuntimeError: Unknown model \(x\)"):
        load_model("timm/x")


class Resnetish(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_torchvision(monkeypatch, tmp_path):
    calls = []

    def get_model(name, **settings):
        calls.append((name, settings))
        return Resnetish()

    models = types.ModuleType("torchvision.models")
    models.get_model = get_model
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert load_model("torchvision/net").module(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    # A checkpoint with a classifier for other classes fits: the classifier is not wanted.
    source = Resnetish(classes=77)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    loaded = load_model("torchvision/net", tmp_path / "w.pth")
    assert torch.equal(loaded.module.conv.weight, source.conv.weight)
    assert calls == [("net", {"weights": "DEFAULT"}), ("net", {"weights": None})]


@pytest.mark.parametrize(
    ("attribute", "part", "width", "dropped"),
    [
        ("fc", nn.Linear(8, 5), 8, "fc"),
        ("classifier", nn.Sequential(nn.Dropout(), nn.Linear(8, 5)), 8, "classifier.1"),
        (
            "classifier",
            nn.Sequential(nn.Linear(8, 6), nn.Hardswish(), nn.Linear(6, 5)),
            6,
            "classifier.2",
        ),
        ("heads", nn.Sequential(nn.Linear(8, 5)), 8, "heads.0"),
        ("head", nn.Linear(8, 5), 8, "head"),
    ],
)
def test_classifiers_come_off(attribute, part, width, dropped):
    network = nn.Module()
    setattr(network, attribute, part)
    assert strip_classifier(network) == (dropped,)
    assert getattr(network, attribute).eval()(torch.ones(2, 8)).shape == (2, width)


def test_convolutional_classifier_becomes_pooling():
    network = nn.Module()
    network.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1))
    assert strip_classifier(network) == ("classifier",)
    pooled = network.classifier(torch.arange(32.0).view(1, 8, 2, 2))
    assert pooled.flatten().tolist() == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5, 25.5, 29.5]


def test_no_classifier():
    with pytest.raises(ModelLoadError, match="Sequential has no classifier that can be removed"):
        strip_classifier(small())


def transformers(network, processor=None, missing=()):
    def load(_, output_loading_info, **__):
        assert output_loading_info
        return network, {"missing_keys": set(missing), "mismatched_keys": set()}

    def from_pretrained(name):
        if processor is None:
            raise OSError(f"{name} has no processor")
        return processor

    return types.SimpleNamespace(
        AutoModel=types.SimpleNamespace(from_pretrained=load),
        AutoConfig=types.SimpleNamespace(from_pretrained=lambda _: {}),
        AutoImageProcessor=types.SimpleNamespace(from_pretrained=from_pretrained),
    )


def test_transformers(monkeypatch):
    network = small()
    processor = types.SimpleNamespace(
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.1, 0.1, 0.1],
        crop_size={"height": 64, "width": 64},
        do_center_crop=True,
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers(network, processor))
    loaded = load_model("hf/org/name")
    assert loaded.module is network
    assert loaded.output_key == "pooler_output"
    assert loaded.preprocessing == Preprocessing(64, "crop", (0.5,) * 3, (0.1,) * 3, crop_pct=1.0)

    monkeypatch.setitem(sys.modules, "transformers", transformers(small()))
    assert load_model("hf/org/name").preprocessing is None


def test_vision_tower_of_a_two_tower_model(monkeypatch):
    network = nn.Module()
    network.vision_model, network.text_model = small(), nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "transformers", transformers(network))
    assert load_model("hf/clip").module is network.vision_model


# Weights


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("model", "state_dict")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints(tmp_path, nest, prefix):
    source, network = small(), small()
    held = {prefix + key: value for key, value in source.state_dict().items()}
    for key in nest:
        held = {key: held, "epoch": 3}
    torch.save(held, tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth")
    assert same(network, source)


def test_wrapped_network_takes_plain_weights(tmp_path):
    source, network = small(), nn.DataParallel(small())
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert same(network.module.cpu(), source)  # which it takes to a GPU where there is one


def test_names_that_differ_in_the_prefix_alone_are_exact(tmp_path):
    def twin():
        network = nn.Module()
        network.a, network.module = nn.Linear(2, 2), nn.Module()
        network.module.a = nn.Linear(2, 2)
        return network

    source, network = twin(), twin()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth")
    assert same(network, source)


def test_missing_counter_is_no_mismatch(tmp_path):
    source, network = small(), small()
    held = source.state_dict()
    del held["1.num_batches_tracked"]
    torch.save(held, tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth")
    assert same(network, source)


def test_mismatches_are_listed_and_nothing_is_loaded(tmp_path):
    source, network = small(), small()
    held = source.state_dict()
    del held["0.bias"]
    held["3.weight"] = torch.ones(7, 4)
    held |= {f"extra.{i}": torch.ones(1) for i in range(7)}
    torch.save(held, tmp_path / "w.pth")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ModelLoadError) as error:
        load_weights(network, tmp_path / "w.pth")
    assert str(error.value).endswith(
        "does not fit Sequential: 1 missing (0.bias); "
        "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more); "
        "1 of another shape (3.weight [7, 4] for [2, 4])"
    )
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


class Payload:
    """Pickled, it calls back when it is loaded."""

    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Payload.ran = True
    return {}


def test_pickled_code_is_never_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload()}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(ModelLoadError, match="gcfast runs no code from a checkpoint"):
            read_weights(tmp_path / name)
    assert not Payload.ran


def test_damaged_and_other_files(tmp_path):
    save_file(small().state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(small().state_dict(), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("half.safetensors", "half.pth", "empty.pth"):
        with pytest.raises(ModelLoadError, match=rf"{name} cannot be read: \w+Error: "):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelLoadError, match="must hold a state dict, got list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(ModelLoadError, match="got other things than tensors: epoch"):
        read_weights(tmp_path / "mixed.pth")


def test_missing_weights_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`weights` must be a file, got .*none.pth"):
        load_model("timm/x", tmp_path / "none.pth")
