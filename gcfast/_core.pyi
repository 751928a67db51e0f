import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Ids = NDArray[np.int64]

def sample_triplets(
    anchors: _Floats,
    anchor_labels: _Ids,
    anchor_rows: _Ids,
    embeddings: _Floats,
    labels: _Ids,
    *,
    triplets: int,
    margin: float,
    seed: int,
    first: int,
    threads: int,
) -> tuple[_Ids, _Ids, _Ids, _Ids]: ...
def mean_cotangents(
    anchors: _Floats,
    anchor_labels: _Ids,
    anchor_rows: _Ids,
    embeddings: _Floats,
    labels: _Ids,
    *,
    margin: float,
    threads: int,
) -> tuple[_Floats, _Ids, _Ids]: ...
