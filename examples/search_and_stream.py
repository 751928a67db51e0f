"""Many rows: a FAISS index beside them, and batches that are searched while the next one runs."""

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network

model = load_network()
loader = [(as_batch([draw_bird(y, seed=0, index=i) for i in range(8)]), [y] * 8) for y in range(8)]
explainer = gcfast.Explainer(model)
database = explainer.build(loader, out="birds.gcfast", overwrite=True)

# Any FAISS factory string; from the shell: gcfast index birds.gcfast --factory IVF8,Flat
database.build_index("HNSW8")
stored = gcfast.load("birds.gcfast", model, index="stored", k=3)

queries = [as_batch([draw_bird(y, seed=1, index=0) for y in range(4)]) for _ in range(3)]
for why in stored.explain_stream(queries, details=True):
    print(why.neighbors.tolist(), "flat maps:", int(why.flat.sum()))

# Fewer rows: the paper's k-means centres, each with the mean of its members' weights.
small = database.compress(8)
small.save("small.gcfast", overwrite=True)
print(f"{len(small)} centres; the first stands for {len(small.members_of(0))} rows")
