"""Which layers can be explained, which one is the default, and how to take another."""

import torch

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network

model = load_network()
table = gcfast.layers(model, torch.rand(1, 3, 128, 128))
print(table)

loader = [(as_batch([draw_bird(y, seed=0, index=i) for i in range(6)]), [y] * 6) for y in range(5)]
query = as_batch([draw_bird(3, seed=1, index=0)])
for layer in (table.default or table[-1], table[0]):
    explainer = gcfast.Explainer(model, layer=layer.name, channels=min(50, layer.channels))
    explainer.build(loader)  # a second pass where the closed form does not hold
    print(layer.name, layer.grid, "closed form" if layer.closed_form else "by autograd",
          explainer.explain_batch(query).shape)  # fmt: skip
