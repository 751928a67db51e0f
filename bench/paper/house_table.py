"""The paper's Table 2: does what the network sees help a price estimate from attributes?

Gradient boosting on the logarithm of the price, once on a set of attributes and once on the same
set with the four features of the tile; the share of test houses whose estimate is within 10 % of
the price. The letters of the sets are the paper's. We hold G for latitude and longitude. What T and
A stand for could not be looked up when this was written: here T is the type of the house and A its
floor area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from house_data import Houses
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

WITHIN = 0.10
LETTERS = {
    "G": ("latitude", "longitude"),
    "Bed": ("bedrooms",),
    "Bath": ("bathrooms",),
    "T": ("type",),
    "A": ("area",),
}
SETS = {
    "none": (),
    "G": ("G",),
    "G, Bed, Bath": ("G", "Bed", "Bath"),
    "G, Bed, Bath, T": ("G", "Bed", "Bath", "T"),
    "G, A": ("G", "A"),
    "all": ("G", "Bed", "Bath", "T", "A"),
}
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Line:
    """One set of attributes: accuracies within 10 %, and the gain with its 95 % interval."""

    name: str
    without: float
    with_features: float
    low: float  # of the gain, by a bootstrap over the test houses
    high: float

    @property
    def gain(self) -> float:
        """With the features less without them."""
        return self.with_features - self.without


def table(houses: Houses, features: NDArray[np.float32], seed: int) -> list[Line]:
    """The six lines.

    Args:
        houses: the first ``houses.train`` of them are fitted, the others estimated.
        features: [N, 4] of their tiles.
        seed: of the boosting and the bootstrap.
    """
    rng = np.random.default_rng([seed, 21])
    lines = []
    for name, letters in SETS.items():
        columns = [column for letter in letters for column in LETTERS[letter]]
        right = [
            within(houses, estimates(houses, columns, extra, seed)) for extra in (None, features)
        ]
        gains = (right[1].astype(float) - right[0])[None]
        picks = rng.integers(0, gains.shape[1], (BOOTSTRAP, gains.shape[1]))
        low, high = np.percentile(gains[0][picks].mean(1), [2.5, 97.5])
        lines.append(Line(name, right[0].mean(), right[1].mean(), float(low), float(high)))
    return lines


def estimates(
    houses: Houses, columns: list[str], features: NDArray[np.float32] | None, seed: int
) -> NDArray[np.float64]:
    """Estimated prices of the test houses; the median training price where nothing is known."""
    n = houses.train
    kinds = sorted(set(houses.kind[:n]))  # a kind that is new among the test houses is "missing"
    numbers = {kind: float(i) for i, kind in enumerate(kinds)}
    values = {
        **houses.numbers,
        "type": np.array([numbers.get(kind, np.nan) for kind in houses.kind]),
    }
    inputs = [values[column] for column in columns]
    inputs += [] if features is None else list(features.T.astype(np.float64))
    if not inputs:
        return np.full(len(houses) - n, np.median(houses.price[:n]))
    x = np.stack(inputs, 1)
    model = HistGradientBoostingRegressor(
        learning_rate=0.05,
        max_iter=250,
        max_leaf_nodes=12,
        min_samples_leaf=20,
        categorical_features=[columns.index("type")] if "type" in columns else None,
        early_stopping=False,
        random_state=seed,
    )
    model.fit(x[:n], np.log(houses.price[:n]))
    return np.exp(model.predict(x[n:]))


def within(houses: Houses, estimated: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which estimates of the test houses are within 10 % of the price."""
    price = houses.price[houses.train :]
    return np.abs(estimated - price) <= WITHIN * price
