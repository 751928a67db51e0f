"""One module without hooks: the forward pass, the search and the maps as one graph."""

import torch

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network

loader = [(as_batch([draw_bird(y, seed=0, index=i) for i in range(6)]), [y] * 6) for y in range(5)]
explainer = gcfast.Explainer(load_network())
explainer.build(loader)

images = as_batch([draw_bird(y, seed=1, index=0) for y in range(4)])
module = explainer.export(normalize="max", center=1.0)
batch = torch.export.Dim("batch", min=1)
program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
torch.export.save(program, "explainer.pt2")

loaded = torch.export.load("explainer.pt2").module()
for part in (images, images[:3]):
    torch.testing.assert_close(loaded(part), explainer.explain_batch(part, center=1.0))
print("the exported program gives the same maps for any batch")
