"""A build whose results come a batch late, as on a GPU, is the build that it is on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from networks import common, loader, other, pictures

import gcfast
import gcfast.builder.rows
from gcfast.builder import offload

LAYER = "backbone"


class Late:
    """Hands out copies of what it was given, when it is asked."""

    def __init__(self):
        self.under_way = self.most = 0

    def start(self, columns):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return {name: column.clone() for name, column in columns.items()}

    def finish(self, token):
        self.under_way -= 1
        return token


@pytest.fixture
def late(monkeypatch):
    """The transports made, all of them late."""
    made = []
    real = offload.Offload.__init__

    def init(self, device, **kwargs):
        made.append(Late())
        real(self, device, **kwargs, transport=made[-1])

    return lambda: monkeypatch.setattr(offload.Offload, "__init__", init) or made


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("make", [common, other], ids=["closed form", "autograd"])
def test_late_results_are_the_same(make, method, late, monkeypatch):
    monkeypatch.setattr(gcfast.builder.rows, "ROWS_AT_ONCE", 8)
    torch.manual_seed(0)
    model = make().eval()
    explainer = gcfast.Explainer(model, LAYER, method=method, channels=3)
    batches = loader(*pictures(30), batch=4)
    at_once = explainer.build(batches)
    made = late()
    behind = explainer.build(batches)
    assert len(made) == 2  # the embeddings, the rows
    assert all((t.under_way, t.most) == (0, 2) for t in made)
    for name in ("embeddings", "channels", "weights", "offsets", "labels", "triplet_counts"):
        assert torch.equal(getattr(behind, name), getattr(at_once, name)), name
    assert list(behind.ids) == list(at_once.ids)
    for key in ("closed_form", "mean_activation", "report"):
        assert behind.manifest[key] == at_once.manifest[key]


def test_an_embedding_that_is_not_finite_is_named_though_the_next_batch_is_under_way(late):
    torch.manual_seed(0)
    batches = loader(*pictures(30), batch=4)
    batches[2][0][1] = float("nan")  # image 9
    late()
    with pytest.raises(ValueError, match=r"`images` must be finite, .* in row 9$"):
        gcfast.Explainer(common().eval(), LAYER, channels=3).build(batches)


@pytest.mark.parametrize(
    ("device", "triplets", "dims", "wanted"),
    [
        ("cpu", 50, 128, 64),
        ("cuda", "all", 128, 64),
        ("cuda", 50, 128, 1280),  # 32 MiB of float32
        ("cuda", 1000, 2048, 64),  # which takes more than that
    ],
)
def test_on_a_gpu_more_rows_are_made_at_once(device, triplets, dims, wanted):
    rows = SimpleNamespace(
        device=torch.device(device),
        settings=SimpleNamespace(triplets=triplets),
        embedded=SimpleNamespace(embeddings=torch.empty(1, dims)),
    )
    assert gcfast.builder.rows.Rows.at_once.fget(rows) == wanted


def test_rows_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    model, batches = common().eval(), loader(*pictures(30), batch=4)
    wanted = gcfast.Explainer(model, LAYER, channels=3).build(batches)
    monkeypatch.setattr(gcfast.builder.rows.Rows, "at_once", 7)
    got = gcfast.Explainer(model, LAYER, channels=3).build(batches)
    assert torch.equal(got.triplet_counts, wanted.triplet_counts)
    assert torch.equal(got.channels, wanted.channels)
    torch.testing.assert_close(got.weights, wanted.weights)
