"""Grad-CAM for embedding networks at the speed of the forward pass.

An implementation of Chen, Chen, Hajimirsadeghi and Mori, *Adapting Grad-CAM for Embedding
Networks*, WACV 2020 (arXiv:2001.06538).
"""

from importlib.metadata import version

from gcfast.capture import TokenGrid
from gcfast.database import Database
from gcfast.errors import (
    DamagedDatabaseError,
    GcfastError,
    MissingExtraError,
    ModelMismatchError,
    NoDatabaseError,
    UnsupportedModelError,
)
from gcfast.explainer import Explainer, Explanation, TripletMaps, explain_batch, load
from gcfast.objectives import DistanceDifference, Objective, PairDistance, Partners, TripletLoss
from gcfast.settings import PAPER

__version__ = version("gcfast")

__all__ = [
    "PAPER",
    "DamagedDatabaseError",
    "Database",
    "DistanceDifference",
    "Explainer",
    "Explanation",
    "GcfastError",
    "MissingExtraError",
    "ModelMismatchError",
    "NoDatabaseError",
    "Objective",
    "PairDistance",
    "Partners",
    "TokenGrid",
    "TripletLoss",
    "TripletMaps",
    "UnsupportedModelError",
    "explain_batch",
    "load",
]
