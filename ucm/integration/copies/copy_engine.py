"""Copies between the device's KV blocks and the slots: the contract.

Who owns what. The engine (vLLM) owns the KV tensors, the node cache the slots' memory, of which an
`Arena` is this rank's mapping. A `CopyEngine` owns its threads, its streams and its staging memory,
and nothing else. A job is one or more pages in one direction, named by the scheduler side. Its
parts may be of several targets: it is one job all the same, and ends once.

    LOAD   slot -> device     before it is submitted, the page is READY and pinned, and no running
                              request uses the blocks
    DUMP   device -> slot     the slot is FILLING, and the blocks are full: nobody writes them again
                              before they are freed. Behind a tail the slot is blank at the end
                              (`tails`)

Threads. All methods but `close` are called by the rank's own thread, the one that runs the forward
pass, and return at once unless "waits" is said below: they put the job on a queue. The engine's
threads issue the copies: on an accelerator one thread per direction, on a stream of its own; on the
CPU a few threads, which take loads before dumps.

Who waits for what.

    a dump          for what was on the rank's current stream at `order_after_forward` (else at its
                    submission): the kernels that wrote its blocks
    a load          for what was on the current stream at `order_before_forward` (else at its
                    submission): a kernel that is still running may write the blocks of a request
                    that has ended, if the engine schedules ahead
    `wait_layer`    the current stream, for the loads of this layer that came by `submit_layer`
    `fence`         the current stream, for these jobs' copies: freed blocks may then be overwritten
    `finished`      nobody; a job is in it when its bytes are where they should be, on every stream
    Arena.close     for the jobs that hold the arena, bounded

On an accelerator `wait_layer` and `fence` wait on the host only until the copies are queued on
their stream, never for the copies themselves. On the CPU they wait for the copies. The scheduler
side frees blocks only after `finished` has named the job or after a fence, commits slots and
unpins only after `finished`.

Who fails how. Nothing here raises into the forward pass. A copy that fails (a fault of the device,
a bug, a wait that was too long) is logged, and its job is named by `failed` as well as by
`finished`: a dump must then not be committed, and the blocks of a load hold no KV. Every job that
was submitted ends, also those of a thread that met something nobody thought of.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from ucm.errors import UcmError
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.job_ledger import JobLedger
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry

logger = logging.getLogger(__name__)

# Copies take milliseconds. One that has not ended by then never will: the device hangs.
COPY_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 10.0

_LAYERWISE_TARGETS = frozenset({0})


class CopyEngine(ABC):
    """See the module. Made by `make`, for one or more targets."""

    def __init__(self, targets: Sequence[CopyTarget]) -> None:
        self._targets_known = frozenset(range(len(targets)))
        self._num_layers = len(targets[0].views)
        self._ledger = JobLedger()

    def submit(
        self, job_id: int, direction: Direction, parts: Sequence[PagePart], arena: Arena
    ) -> None:
        """Copies all layers of `parts`."""
        self._submit(job_id, direction, None, parts, arena, of=(None,))

    def submit_layer(
        self,
        job_id: int,
        direction: Direction,
        layer: int,
        parts: Sequence[PagePart],
        arena: Arena,
    ) -> None:
        """Copies one layer of target 0, a position in its share: no other is copied by layers. The
        job ends when each of the target's layers was submitted and copied. A layer that was
        submitted already is not copied again."""
        self._submit(job_id, direction, layer, parts, arena, of=range(self._num_layers))

    def _submit(
        self,
        job_id: int,
        direction: Direction,
        layer: int | None,
        parts: Sequence[PagePart],
        arena: Arena,
        *,
        of: Iterable[int | None],
    ) -> None:
        """Never raises: a job that can't be submitted ends as failed, its arena free."""
        if not self._ledger.begin(job_id, direction, layer, of=of):
            return
        held = False
        try:
            _check_targets(parts, self._targets_known if layer is None else _LAYERWISE_TARGETS)
            arena.hold()
            held = True
            self._enqueue(job_id, direction, layer, parts, arena)
        except Exception:
            logger.exception("job %d: a %s can't be started", job_id, direction.value)
            if held:
                arena.release()
            self._ledger.close_one(job_id, layer, ok=False)

    def fail(self, job_ids: Iterable[int]) -> None:
        """The bytes of these jobs are not wanted any more, if they are still under way."""
        self._ledger.fail(job_ids)

    def finished(self) -> list[int]:
        """The jobs that ended since the last call, failed ones too."""
        return self._ledger.take_ended()

    def failed(self) -> list[int]:
        """The jobs that `finished` has named since the last call and that did not copy it all."""
        return self._ledger.take_failed()

    def take_busy(self) -> Mapping[Direction, float]:
        """Seconds since the last call in which jobs of each direction were open: from submission
        on, so what a copy waits for is in it."""
        return self._ledger.take_busy()

    def wait_for_news(self, timeout_s: float) -> None:
        """Until `finished` has a job to name, or none is open, or the time is over."""
        self._ledger.wait_for_news(timeout_s)

    @abstractmethod
    def wait_until_queued(self) -> None:
        """Waits, bounded, until the device knows of every copy that was submitted: who waits for
        the device from then on waits for them too."""

    @abstractmethod
    def _enqueue(
        self,
        job_id: int,
        direction: Direction,
        layer: int | None,
        parts: Sequence[PagePart],
        arena: Arena,
    ) -> None:
        """When the copies have ended, releases the arena and tells the ledger. If it raises,
        nothing of this submission was or will be copied."""

    @abstractmethod
    def order_after_forward(self) -> None:
        """Dumps submitted from now on, until the next call, come after what the current stream
        holds now. To be called in every step that dumps (layer-wise: before every layer), or
        never."""

    @abstractmethod
    def order_before_forward(self) -> None:
        """Loads submitted from now on, until the next call, come after what the current stream
        holds now. To be called at the start of every step, or never: loads are then ordered after
        the forward pass that is running when they are submitted, and start that much later."""

    @abstractmethod
    def wait_layer(self, layer: int) -> None:
        """Waits for all loads of this layer that came by `submit_layer`."""

    @abstractmethod
    def fence(self, job_ids: Iterable[int]) -> None:
        """Waits for the copies of these dumps; those that don't get under way in time fail
        instead, as what they read may be overwritten. Jobs that have ended are no error."""

    @abstractmethod
    def close(self) -> None:
        """Lets submitted copies end, bounded, and stops. Any thread; more than once is fine."""


def _check_targets(parts: Sequence[PagePart], known: frozenset[int]) -> None:
    if unknown := {part.target for part in parts} - known:
        raise ValueError(f"parts of targets {sorted(unknown)}, where those are {sorted(known)}")


def first_units(part: PagePart, *, geometry: PageGeometry, block_units: int) -> range:
    """Where each block of `part` starts in its page, in units. Raises if it isn't in the page."""
    start = part.first_token // geometry.unit_tokens
    units = range(start, start + len(part.block_ids) * block_units, block_units)
    if part.first_token % geometry.unit_tokens or not 0 <= start <= units.stop <= (
        geometry.num_units
    ):
        raise UcmError(
            f"{len(part.block_ids)} blocks of {block_units * geometry.unit_tokens} tokens from "
            f"token {part.first_token} on are not inside a page of {geometry.block_tokens}"
        )
    return units


def check_blocks(part: PagePart, *, num_blocks: int) -> None:
    """Asked before every copy: a negative id would be a wrong block, and on an accelerator one that
    is too large would end the process's use of the device."""
    if not all(0 <= block_id < num_blocks for block_id in part.block_ids):
        raise UcmError(f"blocks {part.block_ids} are not all among the engine's {num_blocks}")
