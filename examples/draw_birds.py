"""Drawn birds of 27 species as picture files, one folder for each, and one bird of another."""

from pathlib import Path

from PIL import Image

from gcfast.demo.birds import draw_bird
from gcfast.demo.species import SPECIES, TRAINING_LABELS, UNSEEN_LABELS

for label in TRAINING_LABELS:
    folder = Path("birds", SPECIES[label].name)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        picture = draw_bird(label, seed=0, index=i, size=128)
        Image.fromarray(picture.image).save(folder / f"{i}.png")
for name, i in (("one", 0), ("two", 1), ("unseen", 2)):
    picture = draw_bird(UNSEEN_LABELS[4], seed=3, index=i, size=128)
    Image.fromarray(picture.image).save(f"{name}.png")
