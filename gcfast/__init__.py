"""Grad-CAM for embedding networks at the speed of the forward pass.

An implementation of Chen, Chen, Hajimirsadeghi and Mori, *Adapting Grad-CAM for Embedding
Networks*, WACV 2020 (arXiv:2001.06538).
"""

from importlib.metadata import version
from importlib.util import find_spec

if find_spec("gcfast._core") is None:
    raise ImportError(
        f"gcfast was imported from {__path__[0]}, its source code, which has no compiled module: "
        "run in another folder, or install it with pip install --no-build-isolation -e ."
    )

from gcfast.database.database import Database
from gcfast.errors import (
    DamagedDatabaseError,
    GcfastError,
    MissingExtraError,
    ModelMismatchError,
    NoDatabaseError,
    UnsupportedModelError,
)
from gcfast.explain.default import explain_batch, load
from gcfast.explain.direct.gradcam import ClassMaps, GradCAM
from gcfast.explain.explainer import Explainer
from gcfast.explain.result import Explanation, ObjectMaps, PairMaps, TripletMaps
from gcfast.method.layer_table import LayerTable, layers
from gcfast.method.objectives import (
    DistanceDifference,
    Objective,
    PairDistance,
    Partners,
    RankLoss,
    TripletLoss,
)
from gcfast.method.settings import BEST, PAPER
from gcfast.model.tokens import TokenGrid

__version__ = version("gcfast")

__all__ = [
    "BEST",
    "PAPER",
    "ClassMaps",
    "DamagedDatabaseError",
    "Database",
    "DistanceDifference",
    "Explainer",
    "Explanation",
    "GcfastError",
    "GradCAM",
    "LayerTable",
    "MissingExtraError",
    "ModelMismatchError",
    "NoDatabaseError",
    "ObjectMaps",
    "Objective",
    "PairDistance",
    "PairMaps",
    "Partners",
    "RankLoss",
    "TokenGrid",
    "TripletLoss",
    "TripletMaps",
    "UnsupportedModelError",
    "explain_batch",
    "layers",
    "load",
]
