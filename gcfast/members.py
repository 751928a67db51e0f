"""Which rows the centres of a compressed database stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast.errors import DamagedDatabaseError
from gcfast.manifest import MEMBERS
from gcfast.shards import IdTable, MappedFile, write_tensors

ALLOWED: dict[str, tuple[str, ...]] = {"ends": ("I64",), "id_ends": ("I64",), "id_bytes": ("U8",)}


class MembersFile(MappedFile):
    """The members on the disk; raises as :class:`gcfast.shards.MappedFile`."""

    KIND = "members file"

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        super().__init__(folder, entry, ALLOWED)
        ends, ids = self.columns["ends"], IdTable(self.columns["id_ends"], self.columns["id_bytes"])
        if not len(ends) or int(ends[-1]) != len(ids.ends):
            raise DamagedDatabaseError(
                f"the members file {self.path} must hold {len(ids.ends)} members"
            )
        self.members = Members(ends, ids)


class Members(NamedTuple):
    """The ids of the rows of each centre, centre after centre."""

    ends: Tensor  # [centres] int64: where each centre's members end
    ids: IdTable

    @classmethod
    def of(cls, assignment: Tensor, centres: int, ids: Sequence[str]) -> Members:
        """The members of each centre.

        Args:
            assignment: [N] int64, the centre of each row.
            centres: how many there are.
            ids: the rows' ids.
        """
        order = assignment.argsort(stable=True)
        names = list(ids)
        ends = torch.bincount(assignment, minlength=centres).cumsum(0)
        return cls(ends, IdTable.encoded([names[row] for row in order.tolist()]))

    def of_centre(self, centre: int) -> list[str]:
        """The ids of one centre's rows, in the order of the rows."""
        start = int(self.ends[centre - 1]) if centre else 0
        return self.ids.decoded(start, int(self.ends[centre]))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the file of a database in this folder; returns the manifest's entry."""
        return write_tensors(
            folder / MEMBERS,
            {"ends": self.ends, "id_ends": self.ids.ends, "id_bytes": self.ids.content},
        )
