"""Explain another question: an objective of your own, and maps of one given triplet."""

import torch

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network


def soft_triplet(anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor):
    """log(1 + exp(D(a, p) - D(a, n))), [T, D] each -> [T]: lower is better, and never zero."""
    near = (anchor - positive).square().sum(1)
    far = (anchor - negative).square().sum(1)
    return torch.nn.functional.softplus(near - far)


model = load_network()
loader = [(as_batch([draw_bird(y, seed=0, index=i) for i in range(6)]), [y] * 6) for y in range(5)]
query = as_batch([draw_bird(3, seed=1, index=0)])

for objective in (gcfast.TripletLoss(margin=0.2), gcfast.PairDistance("positive"), soft_triplet):
    explainer = gcfast.Explainer(model, objective=objective)
    database = explainer.build(loader)
    heat = explainer.explain_batch(query)[0]
    peak = divmod(int(heat.argmax()), heat.shape[1])
    print(f"{database.manifest['settings']['objective']}: hottest at {peak}")

# No database: why is the anchor closer to the positive than to the negative?
anchor, positive, negative = (as_batch([draw_bird(y, seed=2, index=i)]) for y, i in
                              ((3, 0), (3, 1), (4, 0)))  # fmt: skip
maps = gcfast.Explainer(model).explain_triplet(anchor, positive, negative)
print({name: list(part.shape) for name, part in maps._asdict().items()})
