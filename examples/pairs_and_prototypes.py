"""Why two pictures are close, and what brings a picture closer to a prototype: no database."""

import torch
from PIL import Image

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.demo.species import UNSEEN_LABELS
from gcfast.images.overlay import overlay

model = load_network()
explainer = gcfast.Explainer(model)

# Two birds of one species, and one of another.
one, two = (draw_bird(UNSEEN_LABELS[0], seed=1, index=i) for i in range(2))
third = draw_bird(UNSEEN_LABELS[1], seed=1, index=0)
query, match, unlike = (as_batch([bird]) for bird in (one, two, third))

why = explainer.explain_pair(query, match)
print(f"cosine {why.similarity.item():.4f}")
print(f"summed over the query's places {why.query_parts.sum().item():.4f}")
print(f"summed over the match's places {why.match_parts.sum().item():.4f}")
print(f"of which no place has {why.query_rest.item():.4f}")

# All of it: to this network any two birds are alike. What is it that a third one has not?
told = explainer.explain_pair(query, match, unlike=unlike)
for bird, heat, name in ((one, told.query, "query"), (two, told.match, "match")):
    Image.fromarray(overlay(bird.image, heat[0].numpy())).save(f"{name}.png")

# Any vector of the embedding space: here the mean of a species, less that of all of them.
with torch.no_grad():
    species = [
        model(as_batch([draw_bird(label, seed=2, index=i) for i in range(8)])).mean(0)
        for label in UNSEEN_LABELS[:4]
    ]
prototype = species[0] - torch.stack(species).mean(0)
maps = explainer.explain_toward(query, prototype)  # [B, OH, OW] in [0, 1]
Image.fromarray(overlay(one.image, maps[0].numpy())).save("prototype.png")
