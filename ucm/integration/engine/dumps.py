"""The scheduler side's dumps: which blocks go into the store, and when.

    todo ──reserve──► asked ──reply──► has a slot ──computed──► copying ──all ranks──► committed

Slots are asked for one step ahead of the computation, so a long prompt holds no more memory than
its next step can fill, and a step hardly ever waits for the answer. Blocks are copied and committed
in prompt order. vLLM keeps a finished request's device blocks until its copies have ended; whose
blocks may be read is asked of the ledger (`device_blocks.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ucm.integration.copies.jobs import CopyJob
from ucm.integration.engine.device_blocks import BlockLedger, Ending
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import RequestState, parents, part_of_block
from ucm.store.blocks.keys import Key
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class DumpJob:
    """`device_blocks` are all of the request's when the job was planned: what it copies depends on
    every one of them up to its own."""

    job_id: int
    blocks: list[int]
    device_blocks: Sequence[int]
    generation: int
    ended: bool = False
    failed: bool = False


@dataclass(eq=False)
class Dump:
    """What of one request's prompt goes into the store. `todo` are the blocks the store lacks, in
    prompt order; a block leaves it when its copy is on its way, when somebody else has it, or when
    it is given up. `slots` maps blocks to offsets (or HAVE) once the node cache has answered. From
    `lost_from` on blocks are missing in the store. All that is said of its blocks is said in the
    `namespace` that it began in, though the engine may be in another one by then."""

    state: RequestState
    namespace: int
    keys: Sequence[Key]
    todo: deque[int]
    lost_from: int
    asked_to: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    jobs: deque[DumpJob] = field(default_factory=deque)
    closed: bool = False


class Dumps:
    """All dumps of one engine. Owned by the engine's thread."""

    def __init__(
        self,
        session: NodeSession,
        facts: EngineFacts,
        ledger: BlockLedger,
        *,
        block_tokens: int,
        timeout_s: float,
    ) -> None:
        # Told of each block that this engine itself is to bring.
        self.on_slot: Callable[[Key], None] = lambda key: None
        self._session = session
        self._ledger = ledger
        self._facts = facts
        self._block_tokens = block_tokens
        self._timeout_s = timeout_s
        self._dumps: dict[str, Dump] = {}
        self._jobs: dict[int, tuple[Dump, DumpJob]] = {}
        self._planned: list[CopyJob] = []
        self._fence: list[int] = []
        self._draining: dict[str, tuple[RequestState, float]] = {}

    # -- a request's life ------------------------------------------------------------------

    def plan(self, state: RequestState, todo: Iterable[int]) -> None:
        """From now on these blocks of the request are dumped as they are computed."""
        if self._facts.dumps and state.request_id not in self._dumps:
            dump = self._dumps[state.request_id] = Dump(
                state,
                self._session.namespace,
                state.keys,
                deque(todo),
                lost_from=len(state.keys),
            )
            self._reserve(dump, state.local_tokens + self._facts.max_step_tokens)

    def is_planned(self, state: RequestState) -> bool:
        return state.request_id in self._dumps

    def computed(self, state: RequestState, num_tokens: int) -> None:
        """This step computes the request's tokens up to `num_tokens`."""
        dump = self._dumps.get(state.request_id)
        if dump is None or not dump.todo:
            return
        self._reserve(dump, num_tokens + self._facts.max_step_tokens)
        num_blocks = state.blocks_in(num_tokens, self._block_tokens)
        if dump.todo[0] < min(num_blocks, dump.asked_to) and dump.todo[0] not in dump.slots:
            # Answers take a tenth of the time; a step that doesn't get one copies in the next.
            self._session.wait_for(lambda: dump.todo[0] in dump.slots)
        self._copy(state, dump, num_blocks)

    def taken_back(self, state: RequestState) -> None:
        """vLLM has the request's device blocks again, or waits for a load into them, and nothing
        more is read; the coming step may write into them. Copies under way are waited for by the
        ranks, the others don't start."""
        self._fence.extend(self._ledger.take_back(state.request_id))
        dump = self._dumps.pop(state.request_id, None)
        if dump is not None:
            self._close(dump)

    def finished(self, state: RequestState) -> bool:
        """The request has ended, and no load of it is under way. True: its device blocks are still
        being copied from. Its `kept_blocks` are known now."""
        dump = self._dumps.get(state.request_id)
        if dump is None:
            return False
        computed = min(state.request.num_computed_tokens, state.num_prompt)
        num_blocks = state.blocks_in(computed, self._block_tokens)
        dump.lost_from = min(dump.lost_from, num_blocks)
        dump.todo = deque(block for block in dump.todo if block < num_blocks)
        self._reserve(dump, computed)
        state.kept_blocks = dump.lost_from
        ending = self._ledger.finish(state.request_id, more_to_dump=bool(dump.todo))
        if ending is not Ending.HELD:
            self._close(self._dumps.pop(state.request_id))
            return False
        self._draining[state.request_id] = (state, time.monotonic())
        return True

    @property
    def is_draining(self) -> bool:
        """Copies of requests that have ended are still under way."""
        return bool(self._draining)

    # -- each step -------------------------------------------------------------------------

    def drain(self) -> tuple[str, ...]:
        """Goes on with finished requests; those whose copies have all ended are returned."""
        released = []
        for request_id, (state, since_s) in list(self._draining.items()):
            dump = self._dumps[request_id]
            self._copy(state, dump, len(dump.keys))
            late = time.monotonic() - since_s > self._timeout_s
            if dump.todo and (late or not self._session.can_store):
                why = "no slots in time" if late else "the node cache doesn't answer"
                logger.warning("%d blocks of %s not stored: %s", len(dump.todo), request_id, why)
                self._give_up(dump)
            if not dump.todo and self._ledger.release(request_id):
                del self._draining[request_id]
                # Slots that were asked for in vain may still be given.
                self._close(self._dumps.pop(request_id))
                released.append(request_id)
        return tuple(released)

    def take_planned(self) -> tuple[CopyJob, ...]:
        planned, self._planned = tuple(self._planned), []
        return planned

    def take_fence(self) -> tuple[int, ...]:
        fence, self._fence = tuple(self._fence), []
        return fence

    def _reserve(self, dump: Dump, to_tokens: int) -> None:
        if not self._session.can_store:
            return
        to_block = dump.state.blocks_in(to_tokens, self._block_tokens)
        blocks = [block for block in dump.todo if dump.asked_to <= block < to_block]
        if not blocks:
            return
        dump.asked_to = blocks[-1] + 1
        self._session.ask(
            p.Reserve(
                id=self._session.next_id(),
                ns=dump.namespace,
                keys=[dump.keys[block] for block in blocks],
                parents=parents(dump.keys, blocks),
                tail_tokens=dump.state.tail_at(blocks[-1] + 1),
            ),
            partial(self._on_reply, dump, blocks),
        )

    def _on_reply(self, dump: Dump, blocks: list[int], reply: p.ReserveReply) -> None:
        for block, offset in zip(blocks, reply.offsets, strict=True):
            dump.slots[block] = offset
            if offset >= 0:
                self.on_slot(dump.keys[block])
        if dump.closed:
            self._abort_slots(dump)

    def _copy(self, state: RequestState, dump: Dump, num_blocks: int) -> None:
        """Plans the copies of leading blocks that are computed and have slots."""
        blocks: list[int] = []
        parts = []
        while dump.todo and dump.todo[0] < num_blocks and dump.todo[0] in dump.slots:
            block = dump.todo[0]
            offset = dump.slots.pop(block)
            if offset == p.NO_ROOM:
                self._give_up(dump)
                break
            dump.todo.popleft()
            if offset == p.HAVE:
                continue
            blocks.append(block)
            parts.append(
                part_of_block(
                    block,
                    offset,
                    state.device_blocks,
                    num_tokens=state.tail_at(block + 1) or self._block_tokens,
                    block_tokens=self._block_tokens,
                    unit=self._facts.block_tokens,
                )
            )
        if not blocks:
            return
        job = DumpJob(
            self._session.next_id(), blocks, state.device_blocks, self._session.generation
        )
        dump.jobs.append(job)
        self._ledger.dump(state.request_id, job.job_id)
        self._jobs[job.job_id] = (dump, job)
        self._planned.append(CopyJob(job.job_id, state.request_id, job.generation, tuple(parts)))

    # -- endings ---------------------------------------------------------------------------

    def is_under_way(self, job_id: int) -> bool:
        return job_id in self._jobs

    def spoiled(self, device_blocks: set[int]) -> None:
        """These blocks, which a step has computed with, hold no KV: nor does what was computed
        behind them. Nothing of it is committed. Other requests may have shared them."""
        for dump, job in self._jobs.values():
            if not device_blocks.isdisjoint(job.device_blocks):
                job.failed = True
                dump.lost_from = min(dump.lost_from, job.blocks[0])
        for dump in self._dumps.values():
            if not device_blocks.isdisjoint(dump.state.device_blocks):
                self._close(dump)

    def state_of(self, job_id: int) -> RequestState | None:
        """The request whose blocks the job copies."""
        dump, _ = self._jobs.get(job_id, (None, None))
        return None if dump is None else dump.state

    def ended(self, job_id: int, *, failed: bool) -> None:
        """All ranks have copied. Commits what is complete in prompt order."""
        dump, job = self._jobs.pop(job_id, (None, None))
        if dump is None or job is None:
            return
        self._ledger.ended(job_id)
        job.ended, job.failed = True, job.failed or failed
        while dump.jobs and dump.jobs[0].ended:
            done = dump.jobs.popleft()
            if done.generation != self._session.generation:
                continue
            keys: list[bytes] = [dump.keys[block] for block in done.blocks]
            if done.failed:
                dump.lost_from = min(dump.lost_from, done.blocks[0])
                self._session.send(p.Abort(ns=dump.namespace, keys=keys))
            else:
                self._session.send(
                    p.Commit(
                        ns=dump.namespace,
                        keys=keys,
                        parents=parents(dump.keys, done.blocks),
                    )
                )

    def _give_up(self, dump: Dump) -> None:
        if dump.todo:
            dump.lost_from = min(dump.lost_from, dump.todo[0])
        dump.todo.clear()
        self._abort_slots(dump)

    def _close(self, dump: Dump) -> None:
        dump.closed = True
        self._give_up(dump)

    def _abort_slots(self, dump: Dump) -> None:
        """Gives back slots that nothing will be copied into."""
        keys: list[bytes] = [dump.keys[b] for b, offset in dump.slots.items() if offset >= 0]
        dump.slots.clear()
        if keys:
            self._session.send(p.Abort(ns=dump.namespace, keys=keys))

    def forget_all(self) -> None:
        """What is being copied won't be committed, and nothing else begins. Jobs outlive their
        dumps: those of preempted requests run on. What waits to be committed waits for one of
        them."""
        for dump, _ in self._jobs.values():
            for job in dump.jobs:
                job.failed = True
        for dump in self._dumps.values():
            dump.lost_from = 0
            self._close(dump)

    def node_lost(self) -> None:
        """Slots are gone with the node cache; running copies go into memory nobody reads."""
        for dump in self._dumps.values():
            # Of what it had, nobody knows what has reached storage.
            dump.lost_from = 0
            dump.slots.clear()
            dump.asked_to = dump.todo[0] if dump.todo else 0
