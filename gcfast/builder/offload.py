"""Keeping the device busy while a build copies its results to the host.

A ``.cpu()`` after every batch makes the device wait for the host: nothing new is launched until the
copy is done. :class:`Offload` runs one batch behind instead: the copies of a batch go to pinned
memory on a stream of their own and are used when the next batch has been launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

RESIDENT_SHARE = 0.5  # of a GPU's free memory that a table may take; the rows' work needs the rest

Note = TypeVar("Note")
Columns = dict[str, Tensor]


class Transport(Protocol):
    """Copies that are started now and finished later."""

    def start(self, columns: Mapping[str, Tensor]) -> Any:
        """Start the copies and return a token for :meth:`finish`."""

    def finish(self, token: Any) -> Columns:
        """Wait for the copies and return the columns on the host, which the caller owns."""


class Offload(Generic[Note]):
    """Columns of batches on the host, in order, each returned once the next has been launched.

    It waits only for the event after the copies of the batch that it returns, and by then the
    device has the following batch to work on. Checks whose errors name rows (finite embeddings and
    weights, a head that still agrees) need values on the host: done on what ``put`` returns, they
    do not wait again. What else such an error needs, the row number or the images, is passed along
    as the note; images stay in memory one batch longer for it.

    Args:
        device: where the columns are made. On the CPU there is nothing to copy or to wait for, and
            a batch is returned at once.
        behind: how many batches are in flight before the first is returned.
        transport: how columns are copied; None for pinned buffers on a GPU.
    """

    def __init__(
        self, device: torch.device, *, behind: int = 1, transport: Transport | None = None
    ) -> None:
        if transport is None and device.type == "cuda":
            transport = PinnedTransport(device, slots=behind + 1)
        self.transport = transport
        self.behind = behind if transport is not None else 0
        self._pending: deque[tuple[Any, Note]] = deque()

    def put(self, columns: Mapping[str, Tensor], note: Note) -> list[tuple[Columns, Note]]:
        """Start a batch; return the batches that are done now, at most one."""
        if self.transport is None:
            return [(dict(columns), note)]
        self._pending.append((self.transport.start(columns), note))
        return [self._take()] if len(self._pending) > self.behind else []

    def drain(self) -> list[tuple[Columns, Note]]:
        """Return what is still in flight, in order: at the end, or before a state is stored."""
        return [self._take() for _ in range(len(self._pending))]

    def _take(self) -> tuple[Columns, Note]:
        assert self.transport is not None
        token, note = self._pending.popleft()
        return self.transport.finish(token), note


class _Copy(NamedTuple):
    slot: int
    shapes: dict[str, torch.Size]
    event: Any  # torch.cuda.Event, recorded after the copies


class PinnedTransport:
    """Copies to a ring of pinned buffers, on a stream of its own.

    Args:
        device: a GPU.
        slots: how many batches may be in flight at once. :meth:`finish` copies a slot's content
            out of it before it is filled again: pinned memory is slow to allocate and is kept.
    """

    def __init__(self, device: torch.device, *, slots: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[Columns] = [{} for _ in range(slots)]
        self._next = 0

    def start(self, columns: Mapping[str, Tensor]) -> _Copy:
        """See :class:`Transport`."""
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        shapes = {}
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, column in columns.items():
                shapes[name] = column.shape
                self._buffer(slot, name, column).copy_(column.reshape(-1), non_blocking=True)
                if column.is_cuda:
                    # Else the allocator gives the memory to the next batch while it is read.
                    column.record_stream(self.stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return _Copy(slot, shapes, event)

    def finish(self, token: _Copy) -> Columns:
        """See :class:`Transport`."""
        token.event.synchronize()
        buffers = self._buffers[token.slot]
        return {
            name: buffers[name][: shape.numel()].clone().view(shape)
            for name, shape in token.shapes.items()
        }

    def _buffer(self, slot: int, name: str, column: Tensor) -> Tensor:
        buffer = self._buffers[slot].get(name)
        if buffer is None or buffer.numel() < column.numel() or buffer.dtype != column.dtype:
            buffer = torch.empty(column.numel(), dtype=column.dtype, pin_memory=True)
            self._buffers[slot][name] = buffer
        return buffer[: column.numel()]


def resident(table: Tensor, device: torch.device, *, free_bytes: int | None = None) -> Tensor:
    """Return the table on the device, where triplets are then drawn, if it fits.

    Args:
        table: on the CPU, memory-mapped or not.
        device: of the model.
        free_bytes: free memory of the device; None asks the driver.

    Returns:
        A copy on the device where the table takes at most RESIDENT_SHARE of what is free; otherwise
        the table itself, and triplets are drawn on the CPU.
    """
    if device.type != "cuda":
        return table
    if free_bytes is None:
        free_bytes, _ = torch.cuda.mem_get_info(device)
    return table.to(device) if table.nbytes <= RESIDENT_SHARE * free_bytes else table
