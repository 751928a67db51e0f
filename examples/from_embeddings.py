"""A database from a FAISS index of embeddings that exist: their images are not run again."""

import faiss
import torch

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.demo.species import SPECIES, TRAINING_LABELS

network = load_network()
drawn = [(label, i) for label in TRAINING_LABELS[:8] for i in range(9)]
images = as_batch([draw_bird(label, seed=0, index=i) for label, i in drawn])
labels = [SPECIES[label].name for label, _ in drawn]

# What people have: an index, filled long ago, and the label of each of its ids.
with torch.no_grad():
    embeddings = network(images)
index = faiss.index_factory(embeddings.shape[1], "IVF4,Flat")
index.train(embeddings.numpy())
index.add(embeddings.numpy())

# A few images find the model's head; a few whose ids are known show that the embeddings are the
# model's. Images of the same kind will do for the first: here they are the same.
explainer = gcfast.Explainer(network)
sample = images[::5]
check = (sample, range(0, len(labels), 5))
database = explainer.build_from_embeddings(index, labels, sample=sample, check=check)
query = as_batch([draw_bird(TRAINING_LABELS[3], seed=1, index=0)])
maps = explainer.explain_batch(query)
print(f"{len(database)} rows from {database.manifest['from_embeddings']}")

# The same maps as from the images.
whole = gcfast.Explainer(network)
whole.build([(images, labels)])
print(f"largest difference: {float((maps - whole.explain_batch(query)).abs().max()):.1e}")

# No database at all: the row of a neighbor is made when it is found.
lazy = explainer.build_from_embeddings(index, labels, rows="on-demand", sample=sample, check=check)
print(f"largest difference: {float((maps - explainer.explain_batch(query)).abs().max()):.1e}")
print(f"{len(lazy)} rows, each made when it is first found")

# No labels: the nearest rows of each row, or clusters, in their place.
for made in ("neighbors", "kmeans:8"):
    explainer.build_from_embeddings(index, made, sample=sample, check=check)
    agreement = torch.cosine_similarity(maps.flatten(), explainer.explain_batch(query).flatten(), 0)
    print(f"{made}: cosine with the map by labels {float(agreement):.2f}")
