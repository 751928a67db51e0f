"""Grad-CAM for embedding networks at the speed of the forward pass.

An implementation of Chen, Chen, Hajimirsadeghi and Mori, *Adapting Grad-CAM for Embedding
Networks*, WACV 2020 (arXiv:2001.06538).
"""

from importlib.metadata import version

from gcfast import library as library  # registers torch.ops.gcfast
from gcfast.database import Database
from gcfast.default import explain_batch, load
from gcfast.errors import (
    DamagedDatabaseError,
    GcfastError,
    MissingExtraError,
    ModelMismatchError,
    NoDatabaseError,
    UnsupportedModelError,
)
from gcfast.explainer import Explainer
from gcfast.explanation import Explanation, TripletMaps
from gcfast.objectives import (
    DistanceDifference,
    Objective,
    PairDistance,
    Partners,
    RankLoss,
    TripletLoss,
)
from gcfast.settings import PAPER
from gcfast.tokens import TokenGrid

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
    "RankLoss",
    "TokenGrid",
    "TripletLoss",
    "TripletMaps",
    "UnsupportedModelError",
    "explain_batch",
    "load",
]
