"""From pictures to heat maps: build a database, save it, load it, explain unseen pictures."""

from PIL import Image

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.demo.species import SPECIES, TRAINING_LABELS, UNSEEN_LABELS
from gcfast.images.overlay import overlay

model = load_network()  # any nn.Module: images [B, 3, h, w] -> embeddings [B, D]

# Any iterable of (images, labels) or (images, labels, ids): a DataLoader, a list, a generator.
loader = []
for label in TRAINING_LABELS[:6]:
    pictures = [draw_bird(label, seed=0, index=i) for i in range(8)]
    loader.append((as_batch(pictures), [SPECIES[label].name] * 8))

explainer = gcfast.Explainer(model)
database = explainer.build(loader)
database.save("birds.gcfast", overwrite=True)  # without it, an existing database is refused
print(f"explained layer: {explainer.layer_name}; {database}")

# In the process that answers queries, once:
gcfast.load("birds.gcfast", model)

# For every batch:
queries = [draw_bird(label, seed=1, index=0) for label in UNSEEN_LABELS[:4]]
images = as_batch(queries)
maps = gcfast.explain_batch(images)  # [B, OH, OW] in [0, 1]
why = gcfast.explain_batch(images, details=True)
for row, (name,), distance in zip(why.neighbors[:, 0], why.label_names, why.distances, strict=True):
    print(f"weights from row {row} ({name}), at squared distance {distance.item():.3f}")

Image.fromarray(overlay(queries[0].image, maps[0].numpy())).save("heat.png")
