"""A database on disk: build it in a way that survives a kill, add rows, ask how far to trust it."""

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.demo.species import SPECIES, TRAINING_LABELS


def batches(indices: range):
    """One batch for each of eight species, the same every time it is asked."""
    for label in TRAINING_LABELS[:8]:
        pictures = [draw_bird(label, seed=0, index=i) for i in indices]
        ids = [f"{SPECIES[label].name} {i}" for i in indices]
        yield as_batch(pictures), [SPECIES[label].name] * len(ids), ids


class Loader:
    """A loader gives the same images in the same order in every pass: a generator would not."""

    def __init__(self, indices: range) -> None:
        self.indices = indices

    def __iter__(self):
        """Start from the first batch again."""
        return batches(self.indices)


explainer = gcfast.Explainer(load_network())
# Rows are written as they are made. If this process is killed, the same call continues; where a
# complete database is there, it is replaced in the end.
explainer.build(Loader(range(6)), out="birds.gcfast", resume=True, overwrite=True)
database = explainer.append(Loader(range(6, 9)))  # the rows that are there stay as they are
print(f"{len(gcfast.Database.open('birds.gcfast', verify=True))} rows: {database.report}")

# How well do transferred maps agree with an image's own, and would a random row's agree as well?
print(explainer.calibrate(Loader(range(20, 24))))
images, _, _ = next(batches(range(30, 33)))
print("confidence:", explainer.explain_batch(images, details=True).confidence)
database.save("calibrated.gcfast", overwrite=True)
