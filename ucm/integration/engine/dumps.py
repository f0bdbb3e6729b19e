"""The scheduler side's dumps: which blocks go into the store, and when.

    todo ──reserve──► asked ──reply──► has a slot ──computed──► copying ──all ranks──► committed

Slots are asked for one step ahead of the computation, so a long prompt holds no more memory than
its next step can fill, and a step hardly ever waits for the answer. Blocks are copied and committed
in prompt order. vLLM keeps a finished request's device blocks until its copies have ended; whose
blocks may be read is asked of the ledger (`device_blocks.py`), and how far a prompt is its cursor
(`ranges.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ucm.integration.copies.jobs import CopyJob
from ucm.integration.engine.device_blocks import BlockLedger, BlockReturn
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import DumpCursor, part_of_block
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
    """What of one request's prompt goes into the store. `device_blocks` are the request's as vLLM
    has named them last. All that is said of its blocks is said in the `namespace` that it began
    in, though the engine may be in another one by then."""

    prompt: Prompt
    namespace: int
    cursor: DumpCursor
    device_blocks: Sequence[int] = ()
    jobs: deque[DumpJob] = field(default_factory=deque)
    closed: bool = False

    def keys_of(self, blocks: Iterable[int]) -> list[bytes]:
        return [self.prompt.keys[block] for block in blocks]


@dataclass(frozen=True)
class DumpEnd:
    """Of a request that has ended: `kept_blocks` leading blocks are in the store or on their way
    there. While it `is_copying` its device blocks are still being copied from."""

    is_copying: bool
    kept_blocks: int


class Dumps:
    """All dumps of one engine. Owned by the engine's thread."""

    def __init__(
        self,
        session: NodeSession,
        facts: EngineFacts,
        ledger: BlockLedger,
        *,
        timeout_s: float,
    ) -> None:
        # Told of each block that this engine itself is to bring.
        self.on_slot: Callable[[Key], None] = lambda key: None
        self._session = session
        self._ledger = ledger
        self._facts = facts
        self._timeout_s = timeout_s
        self._dumps: dict[str, Dump] = {}
        self._jobs: dict[int, tuple[Dump, DumpJob]] = {}
        self._planned: list[CopyJob] = []
        self._fence: list[int] = []
        self._draining: dict[str, float] = {}

    # -- a request's life ------------------------------------------------------------------

    def plan(self, prompt: Prompt, todo: Iterable[int], *, num_computed: int) -> None:
        """From now on these blocks of the request are dumped as they are computed."""
        if self._facts.dumps and prompt.request_id not in self._dumps:
            cursor = DumpCursor(todo, len(prompt.keys))
            dump = Dump(prompt, self._session.namespace, cursor)
            self._dumps[prompt.request_id] = dump
            self._reserve(dump, num_computed + self._facts.max_step_tokens)

    def is_planned(self, request_id: str) -> bool:
        return request_id in self._dumps

    def allocated(self, request_id: str, device_blocks: Sequence[int]) -> None:
        """vLLM has given the request these, of which it may have computed some before."""
        if (dump := self._dumps.get(request_id)) is not None:
            dump.device_blocks = device_blocks

    def computed(self, request_id: str, num_tokens: int, device_blocks: Sequence[int]) -> None:
        """This step computes the request's tokens up to `num_tokens`, into these blocks."""
        dump = self._dumps.get(request_id)
        if dump is None:
            return
        dump.device_blocks = device_blocks
        cursor = dump.cursor
        if not cursor.todo:
            return
        self._reserve(dump, num_tokens + self._facts.max_step_tokens)
        num_blocks = dump.prompt.blocks_in(num_tokens)
        # Answers take a tenth of the time; a step that doesn't get one copies in the next.
        self._session.wait_for(lambda: not cursor.is_awaited(num_blocks))
        self._copy(dump, num_blocks)

    def taken_back(self, request_id: str) -> None:
        """vLLM has the request's device blocks again, or waits for a load into them, and nothing
        more is read; the coming step may write into them. Copies under way are waited for by the
        ranks, the others don't start."""
        self._fence.extend(self._ledger.take_back(request_id))
        dump = self._dumps.pop(request_id, None)
        if dump is not None:
            self._close(dump)

    def finished(self, request_id: str, num_tokens: int, device_blocks: Sequence[int]) -> DumpEnd:
        """The request has ended with its tokens up to `num_tokens` computed, and no load of it is
        under way."""
        dump = self._dumps.get(request_id)
        if dump is None:
            return DumpEnd(is_copying=False, kept_blocks=0)
        dump.device_blocks = device_blocks
        cursor = dump.cursor
        cursor.end_at(dump.prompt.blocks_in(num_tokens))
        self._reserve(dump, num_tokens)
        ended = DumpEnd(is_copying=True, kept_blocks=cursor.lost_from)
        ending = self._ledger.finish(request_id, more_to_dump=bool(cursor.todo))
        if ending is BlockReturn.HELD:
            self._draining[request_id] = time.monotonic()
            return ended
        self._close(self._dumps.pop(request_id))
        return replace(ended, is_copying=False)

    @property
    def is_draining(self) -> bool:
        """Copies of requests that have ended are still under way."""
        return bool(self._draining)

    # -- each step -------------------------------------------------------------------------

    def drain(self) -> tuple[str, ...]:
        """Goes on with finished requests; those whose copies have all ended are returned."""
        released = []
        for request_id, since_s in list(self._draining.items()):
            dump = self._dumps[request_id]
            todo = dump.cursor.todo
            self._copy(dump, len(dump.prompt.keys))
            late = time.monotonic() - since_s > self._timeout_s
            if todo and (late or not self._session.can_store):
                why = "no slots in time" if late else "the node cache doesn't answer"
                logger.warning("%d blocks of %s not stored: %s", len(todo), request_id, why)
                self._give_up(dump)
            if not todo and self._ledger.release(request_id):
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
        prompt = dump.prompt
        blocks = dump.cursor.ask(prompt.blocks_in(to_tokens))
        if not blocks:
            return
        self._session.ask(
            p.Reserve(
                id=self._session.next_id(),
                ns=dump.namespace,
                keys=dump.keys_of(blocks),
                parents=prompt.parents(blocks),
                tail_tokens=prompt.tail_at(blocks[-1] + 1),
            ),
            partial(self._on_reply, dump, blocks),
        )

    def _on_reply(self, dump: Dump, blocks: list[int], reply: p.ReserveReply) -> None:
        for block, offset in zip(blocks, reply.offsets, strict=True):
            dump.cursor.slots[block] = offset
            if offset >= 0:
                self.on_slot(dump.prompt.keys[block])
        if dump.closed:
            self._abort_slots(dump)

    def _copy(self, dump: Dump, num_blocks: int) -> None:
        """Plans the copies of leading blocks that are computed and have slots."""
        prompt = dump.prompt
        taken = dump.cursor.take(num_blocks)
        if not dump.cursor.todo:
            self._abort_slots(dump)
        if not taken:
            return
        parts = tuple(
            part_of_block(
                each.block,
                each.offset,
                dump.device_blocks,
                num_tokens=prompt.tokens_of(each.block),
                block_tokens=prompt.block_tokens,
                unit=self._facts.block_tokens,
            )
            for each in taken
        )
        blocks = [each.block for each in taken]
        job = DumpJob(self._session.next_id(), blocks, dump.device_blocks, self._session.generation)
        dump.jobs.append(job)
        self._ledger.dump(prompt.request_id, job.job_id)
        self._jobs[job.job_id] = (dump, job)
        self._planned.append(CopyJob(job.job_id, prompt.request_id, job.generation, parts))

    # -- endings ---------------------------------------------------------------------------

    def is_under_way(self, job_id: int) -> bool:
        return job_id in self._jobs

    def spoiled(self, device_blocks: set[int]) -> None:
        """These blocks, which a step has computed with, hold no KV: nor does what was computed
        behind them. Nothing of it is committed. Other requests may have shared them."""
        for dump, job in self._jobs.values():
            if not device_blocks.isdisjoint(job.device_blocks):
                job.failed = True
                dump.cursor.lose(job.blocks[0])
        for dump in self._dumps.values():
            if not device_blocks.isdisjoint(dump.device_blocks):
                self._close(dump)

    def prompt_of(self, job_id: int) -> Prompt | None:
        """The prompt whose blocks the job copies."""
        dump, _ = self._jobs.get(job_id, (None, None))
        return None if dump is None else dump.prompt

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
            keys = dump.keys_of(done.blocks)
            if done.failed:
                dump.cursor.lose(done.blocks[0])
                self._session.send(p.Abort(ns=dump.namespace, keys=keys))
            else:
                parents = dump.prompt.parents(done.blocks)
                self._session.send(p.Commit(ns=dump.namespace, keys=keys, parents=parents))

    def _give_up(self, dump: Dump) -> None:
        dump.cursor.give_up()
        self._abort_slots(dump)

    def _close(self, dump: Dump) -> None:
        dump.closed = True
        self._give_up(dump)

    def _abort_slots(self, dump: Dump) -> None:
        """Gives back slots that nothing will be copied into."""
        keys = dump.keys_of(dump.cursor.take_unused())
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
            dump.cursor.lose(0)
            self._close(dump)

    def node_lost(self) -> None:
        """Slots are gone with the node cache; running copies go into memory nobody reads."""
        for dump in self._dumps.values():
            dump.cursor.node_lost()
