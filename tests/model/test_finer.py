"""Which earlier layers refine maps: those that "auto" finds, and those that are named."""

import pytest
import torch
import torch.nn.functional as F
from networks import CHANNELS, DIM, TokenNet, common, pictures
from torch import nn

from gcfast.model.network import Network


class Block(nn.Module):
    """A residual block, or with a stride one that expands its input first and has no shortcut."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(into, 2 * out, 1)
        self.conv = nn.Conv2d(2 * out, out, 3, stride, padding=1)
        self.straight = stride == 1 and into == out

    def forward(self, maps):
        out = self.conv(F.relu(self.expand(maps)))
        return maps + out if self.straight else out


class Staged(nn.Module):
    """Stages at 16 x 16, 8 x 8 and 4 x 4 for [B, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, padding=1)
        self.stages = nn.Sequential(
            nn.Sequential(Block(6, 6), Block(6, 6)),
            nn.Sequential(Block(6, 8, 2), Block(8, 8), nn.Identity()),
            nn.Sequential(Block(8, CHANNELS, 2), Block(CHANNELS, CHANNELS)),
        )
        self.gate = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS, DIM)

    def forward(self, images):
        maps = self.stem(images)
        return self.fc(self.stages(maps * self.gate(maps).sigmoid()).mean((2, 3)))


def found(model, layer=None, size=(32, 32), **options):
    network = Network(model.eval(), layer, refine="auto", **options)
    captured = network.embed(pictures(2, size=size)[0], finer=True)
    return [one.layer_name for one in network.finer], captured.finer


def test_auto_takes_the_last_stages_at_two_and_four_times_the_resolution():
    names, outputs = found(Staged())
    assert names == ["stages.1", "stages.0"]
    assert [list(x.shape) for x in outputs] == [[2, 8, 8, 8], [2, 6, 16, 16]]


def test_auto_goes_by_the_layer_that_is_explained():
    # At 8 x 8, of which twice is the first stage; at 16 x 16 only the image is finer.
    assert found(Staged(), "stages.1")[0] == ["stages.0"]
    assert found(Staged(), "stages.0")[0] == []


def test_auto_takes_sizes_that_do_not_come_out_even():
    _, outputs = found(Staged(), size=(33, 28))  # 5 x 4, 9 x 7, 17 x 14
    assert [list(x.shape[2:]) for x in outputs] == [[9, 7], [17, 14]]


def test_auto_leaves_out_padded_outputs():
    class Padded(Staged):
        def __init__(self) -> None:
            super().__init__()
            # As convolutions that pad like TensorFlow's do: 6 x 6 for 4 x 4.
            wide = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(CHANNELS, CHANNELS, 3))
            self.stages[2].append(wide)

    assert found(Padded())[0] == ["stages.1", "stages.0"]


def test_auto_leaves_out_what_does_not_lead_to_the_layer():
    class Beside(Staged):
        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Conv2d(6, 8, 3, 2, padding=1)

        def forward(self, images):
            self.beside(self.stem(images))
            return super().forward(images)

    assert found(Beside())[0] == ["stages.1", "stages.0"]


def test_auto_without_a_graph():
    class Frozen(Staged):
        def forward(self, images):
            with torch.no_grad():
                return super().forward(images)

    assert found(Frozen(), "stages")[0] == ["stages.1", "stages.0"]


def test_auto_finds_nothing_among_tokens_that_are_as_many_everywhere():
    assert found(TokenNet(), size=(8, 8))[0] == []


def test_a_pass_takes_finer_outputs_only_where_they_are_asked_for():
    network = Network(Staged().eval(), refine="auto")
    images = pictures(2, size=(32, 32))[0]
    assert network.embed(images).finer == ()
    assert network.finer is None  # nothing was looked for
    with network.differentiable(images) as captured:
        assert captured.finer == ()
    with network.differentiable(images, finer=True) as captured:
        assert [x.shape[2] for x in captured.finer] == [8, 16]
        assert not any(x.requires_grad for x in captured.finer)
        assert captured.output.requires_grad
    assert not any(module._forward_hooks for module in network.model.modules())


def test_named_as_a_module_a_name_or_a_run():
    model = Staged().eval()
    images = pictures(2, size=(32, 32))[0]
    maps = model.stem(images)
    wanted = model.stages[0](maps * model.gate(maps).sigmoid()).detach()
    for refine in ("stages.0", model.stages[0], ["stages.0"], (model.stages[0],)):
        (got,) = Network(model, "stages", refine=refine).embed(images, finer=True).finer
        torch.testing.assert_close(got, wanted)
    names = [model.stages[1], "stages.1.0", "stem"]
    got = Network(model, "stages", refine=names).embed(images, finer=True).finer
    assert [list(x.shape) for x in got] == [[2, 8, 8, 8], [2, 8, 8, 8], [2, 6, 16, 16]]


def test_a_model_whose_output_is_a_dictionary():
    model = Staged().eval()
    wrapped = nn.Sequential(model)
    names, _ = found(wrapped)
    assert names == ["0.stages.1", "0.stages.0"]


@pytest.mark.parametrize(
    ("refine", "error", "words"),
    [
        ("stages.7", ValueError, "`refine` must name a module of `model`, got 'stages.7'; close"),
        (nn.Linear(1, 1), ValueError, "`refine` must be a module of `model`, got a Linear"),
        (3, TypeError, "`refine` must be None, 'auto', or names or modules of layers, got int"),
        ([3], TypeError, "`refine` must be a dotted name or a module, got int"),
        ([], ValueError, "`refine` must name at least one layer, or be None, got an empty list"),
        ("stages.2", ValueError, "`refine` must name layers that run before 'stages.1', .*got 's"),
        ("gate", ValueError, r"`refine` must have a spatial output .*, got 'gate' with \[2, 6, 1"),
        ("fc", ValueError, "run before 'stages.1'"),
        (["stem", "stages.1.0"], ValueError, "from coarse to fine, .* 8 x 8 after 'stem' with 16"),
        ("stages.2.0", ValueError, "run before 'stages.1'"),
    ],
    ids=str,
)
def test_layers_that_cannot_refine_are_refused(refine, error, words):
    images = pictures(2, size=(32, 32))[0]
    with pytest.raises(error, match=words):
        Network(Staged().eval(), "stages.1", refine=refine).embed(images, finer=True)


def test_a_coarser_layer_is_refused():
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Conv2d(3, 4, 3, 4, padding=1)
            self.large = nn.Upsample(scale_factor=2)
            self.fc = nn.Linear(4, DIM)

        def forward(self, images):
            return self.fc(self.large(self.small(images)).mean((2, 3)))

    network = Network(Widening(), "large", refine="small")
    with pytest.raises(
        ValueError, match=r"coarser .*, got 'small' with 4 x 4 after 'large' with 8"
    ):
        network.embed(pictures(2, size=(16, 16))[0], finer=True)


def test_a_layer_that_runs_twice_must_say_which():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.last = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 5, 2, 2)

        def forward(self, images):
            return self.last(self.act(self.one(self.act(images)))).mean((2, 3))

    model, images = Twice().eval(), pictures(2)[0]
    with pytest.raises(Exception, match=r"`refine` must run once .*, got 'act', which ran 2 times"):
        Network(model, "last", refine="act").embed(images, finer=True)
    (got,) = Network(model, "last", refine="act@1").embed(images, finer=True).finer
    torch.testing.assert_close(got, F.relu(images))
    with pytest.raises(Exception, match="got 'act@3', which ran 2 times"):
        Network(model, "last", refine="act@3").embed(images, finer=True)


def test_tokens_and_channels_last_are_laid_out():
    model, images = TokenNet().eval(), pictures(2)[0]
    (got,) = Network(model, "attention", refine="first").embed(images, finer=True).finer
    assert got.shape == (2, CHANNELS, 4, 4)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.LayerNorm(3), common()

        def forward(self, images):
            return self.net(self.norm(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    model = Last().eval()
    (got,) = Network(model, "net.backbone", refine="norm").embed(images, finer=True).finer
    torch.testing.assert_close(
        got, model.norm(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).detach()
    )
