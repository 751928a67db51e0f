"""A build whose results come a batch late, as on a GPU, is the build that it is on the CPU."""

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
