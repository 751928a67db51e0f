"""The species of the demonstration: one part of the bird, and how it looks.

All birds share one body. The color of a single part tells a species; every other part takes its
color from the plumage, which varies from bird to bird. Each family (all species told by the same
part) is split in two, so that a network trained on one half meets known parts in unknown colors in
the other.
"""

from __future__ import annotations

from dataclasses import dataclass

Color = tuple[float, float, float]

# Field marks of real birds, different enough to be told apart under warm and cool light.
COLORS: dict[str, Color] = {
    "red": (205, 32, 28),
    "yellow": (245, 205, 30),
    "blue": (35, 95, 215),
    "white": (246, 244, 238),
    "black": (22, 20, 24),
    "violet": (165, 50, 185),
    "teal": (20, 165, 140),
    "orange": (240, 120, 20),
}

# Six looks for each family, training half first. Every color is in the training half of some
# families and in the other half of others: no color is new to the network, only its place.
_LOOKS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {
    "crown": (("red", "white", "teal"), ("yellow", "blue", "black")),
    "bill": (("yellow", "blue", "violet"), ("red", "white", "teal")),
    "eye-ring": (("white", "red", "teal"), ("yellow", "blue", "orange")),
    "throat": (("yellow", "blue", "black"), ("red", "white", "violet")),
    "breast": (("red", "black", "teal"), ("yellow", "blue", "violet")),
    "wing-bar": (("white", "blue", "orange"), ("yellow", "red", "teal")),
    "rump": (("yellow", "violet", "white"), ("red", "blue", "black")),
    "tail": (("blue", "white", "orange"), ("red", "yellow", "violet")),
    "legs": (("red", "yellow", "teal"), ("blue", "white", "orange")),
}

PARTS: tuple[str, ...] = tuple(_LOOKS)


@dataclass(frozen=True)
class Species:
    """One species: ``part`` tells it, ``look`` is the color of that part."""

    part: str
    look: str

    @property
    def name(self) -> str:
        """Return for example "yellow-crown"."""
        return f"{self.look}-{self.part}"


def _half(which: int) -> list[Species]:
    return [Species(part, look) for part, looks in _LOOKS.items() for look in looks[which]]


# Labels are positions in this tuple: the training half first, then the unseen half.
SPECIES: tuple[Species, ...] = (*_half(0), *_half(1))
TRAINING_LABELS: tuple[int, ...] = tuple(range(len(SPECIES) // 2))
UNSEEN_LABELS: tuple[int, ...] = tuple(range(len(SPECIES) // 2, len(SPECIES)))
