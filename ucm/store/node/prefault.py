"""Taking the shared memory before it is needed, and telling ranks which parts they may prepare.

The first copy into fresh memory costs three copies, and on an accelerator memory has to be pinned
before a copy is fast. Preparing it costs as much, and steals that from a forward pass that runs
meanwhile. So it is done in quiet moments, mostly while the engines are still starting: from the
front of the memory, where the first slots are, up to a bound that leaves the machine room for what
else it has to do. What is put into use beyond that is prepared as it comes.
"""

from __future__ import annotations

from collections.abc import Callable

from ucm.store.node import protocol as p
from ucm.store.node.parts import Populate
from ucm.store.node.slots import SlotTable, Span

_STEP_BYTES = 64 << 20
_QUIET_S = 0.2


class MemoryAhead:
    """Owned by the event loop's thread. `populate(offset, nbytes, on_done)` takes memory on another
    thread; `announce` tells all ranks."""

    def __init__(
        self,
        slots: SlotTable,
        *,
        up_to_bytes: int,
        populate: Populate,
        announce: Callable[[p.MemoryInUse], None],
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._up_to_bytes = min(up_to_bytes, slots.capacity_bytes)
        self._populate = populate
        self._announce = announce
        self._clock = clock
        self._taken_bytes = 0
        self._is_taking = False
        self._busy_s = clock()
        slots.on_span = self._span_in_use

    def in_use(self) -> list[p.MemoryInUse]:
        """For a rank that has just come: everything that was announced so far."""
        front = p.MemoryInUse(offset=0, nbytes=self._taken_bytes)
        beyond = [self._message(s) for s in self._slots.spans() if not self._is_taken(s)]
        return ([front] if self._taken_bytes else []) + beyond

    def is_busy(self) -> None:
        """Somebody waits for the node cache, or soon will."""
        self._busy_s = self._clock()

    def tick(self) -> None:
        quiet = self._clock() - self._busy_s >= _QUIET_S
        if self._is_taking or not quiet or self._taken_bytes >= self._up_to_bytes:
            return
        offset = self._taken_bytes
        nbytes = min(_STEP_BYTES, self._up_to_bytes - offset)
        self._is_taking = True

        def taken() -> None:
            self._is_taking = False
            self._taken_bytes += nbytes
            self._announce(p.MemoryInUse(offset=offset, nbytes=nbytes))

        self._populate(offset, nbytes, taken)

    def _span_in_use(self, span: Span) -> None:
        if self._is_taken(span):
            return
        message = self._message(span)
        self._populate(message.offset, message.nbytes, lambda: None)
        self._announce(message)

    def _is_taken(self, span: Span) -> bool:
        message = self._message(span)
        return message.offset + message.nbytes <= self._taken_bytes

    def _message(self, span: Span) -> p.MemoryInUse:
        extent_bytes = self._slots.extent_bytes
        return p.MemoryInUse(
            offset=span.first_extent * extent_bytes, nbytes=span.num_extents * extent_bytes
        )
