from typing import Any

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
    by_label: _Ids,
    sketch: NDArray[np.uint8] | None,
    *,
    triplets: int,
    margin: float,
    seed: int,
    first: int,
    tries: int,
    threads: int,
) -> tuple[_Ids, _Ids, _Ids, _Ids, NDArray[np.bool_]]: ...
def mean_cotangents(
    anchors: _Floats,
    anchor_labels: _Ids,
    anchor_rows: _Ids,
    embeddings: _Floats,
    labels: _Ids,
    by_label: _Ids,
    *,
    margin: float,
    threads: int,
) -> tuple[_Floats, _Ids, _Ids]: ...

_Array = NDArray[Any]
_Transferred = tuple[_Ids, _Floats, _Ids, _Ids, _Ids, _Floats, _Floats]

class TransferEngine:
    def __init__(
        self,
        index: Any,
        shards: list[Any],
        *,
        dim: int,
        width: int,
        threads: int,
        memory_bytes: int,
    ) -> None: ...
    def transfer(
        self,
        queries: _Floats,
        *,
        k: int,
        temperature: float = 1.0,
        buffers: tuple[_Array, ...] | None = None,
    ) -> _Transferred: ...
    def search(self, queries: _Floats, *, k: int) -> tuple[_Floats, _Ids]: ...
