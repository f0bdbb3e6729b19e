"""Ranks without a device: what every token's KV is, and when each part of a copy happens.

The KV of a token is a number made of the token and of the KV before it, as the blocks hold that: so
one wrong block anywhere makes everything behind it wrong, and a page can be compared with what its
tokens say.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    get_mamba_prefill_checkpoint_position,
    is_mamba_prefill_checkpoint_valid,
)
from vllm.v1.outputs import KVConnectorOutput

from ucm.integration.copies.jobs import CopyJob, PagePart
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.store.blocks.strands import ALL, STATE, Reach, ReachKind

UNIT = 16
# As a page has it: one row, a token's content after the other's.
TOKEN_BYTES = 256
_MASK = (1 << 62) - 1


def kv_of(before: int, token: int) -> int:
    return hash((before, token)) & _MASK


def kv_of_prompt(tokens: Iterable[int]) -> list[int]:
    values, before = [], 0
    for token in tokens:
        before = kv_of(before, token)
        values.append(before)
    return values


def kv_in_group(value: int, group: int) -> int:
    """What a group has of a token whose KV in the first one is `value`."""
    return (value ^ group * 0x5DEECE66D) & _MASK


@dataclass(eq=False)
class _Copy:
    job: CopyJob
    is_load: bool
    fails: bool
    parts: deque[PagePart]

    @property
    def blocks(self) -> set[int]:
        return {block for part in self.job.parts for block in part.block_ids}


class Rank:
    """One of several: each keeps its own share of every token's KV, in its own device memory."""

    def __init__(
        self,
        number: int,
        *,
        num_blocks: int,
        block_tokens: int,
        memory_of: Callable[[int], memoryview | None],
        rng: random.Random,
        failing: float,
        reaches: Sequence[Reach] = (ALL,),
        checkpoints: bool = False,
    ) -> None:
        self.number = number
        self.device = [[-1] * UNIT for _ in range(num_blocks)]
        self.copies: dict[int, _Copy] = {}
        self._block_tokens = block_tokens
        self._memory_of = memory_of
        self._rng = rng
        self._failing = failing
        self._reaches = reaches
        self._checkpoints = checkpoints
        self._ended: list[_Copy] = []

    # -- a step ----------------------------------------------------------------------------

    def fence(self, step: StepMetadata) -> None:
        for job_id in step.fence:
            if job_id in self.copies:
                self._advance(self.copies[job_id], to_the_end=True)

    def load_in_step(self, step: StepMetadata) -> None:
        for job in step.step_loads:
            self._begin(job, is_load=True)
            if job.job_id in self.copies:
                self._advance(self.copies[job.job_id], to_the_end=True)

    def submit(self, step: StepMetadata) -> None:
        for job in step.loads:
            self._begin(job, is_load=True)
        for job in step.dumps:
            self._begin(job, is_load=False)
        for job_id in step.at_once:
            if job_id in self.copies:
                self._advance(self.copies[job_id], to_the_end=True)

    def run_some(self) -> None:
        """Copies go on, a part here and a part there."""
        for copy in list(self.copies.values()):
            if self._rng.random() < 0.5:
                self._advance(copy, to_the_end=self._rng.random() < 0.3)

    def report(self, step: StepMetadata, *, all_of_them: bool) -> KVConnectorOutput:
        report, received, bad, failed = RankReport(), set(), set(), set()
        in_step = {job.job_id for job in step.step_loads}
        for copy in list(self._ended):
            job_id = copy.job.job_id
            if not (all_of_them or job_id in in_step or self._rng.random() < 0.6):
                continue
            self._ended.remove(copy)
            report.ended[job_id] = 1
            if copy.is_load and job_id not in in_step:
                received.add(copy.job.request_id)
            if copy.fails:
                report.failed[job_id] = 1
                if copy.is_load and self._reaches != (ALL,):
                    failed.add(copy.job.request_id)
                elif copy.is_load:
                    bad |= copy.blocks
        return KVConnectorOutput(
            finished_sending=set(step.released) or None,
            finished_recving=received or None,
            invalid_block_ids=bad,
            failed_recving=failed,
            kv_connector_worker_meta=report if report.ended else None,
        )

    # -- copies ----------------------------------------------------------------------------

    def _begin(self, job: CopyJob, *, is_load: bool) -> None:
        fails = self._memory_of(job.generation) is None or self._rng.random() < self._failing
        copy = _Copy(job, is_load, fails, deque(job.parts))
        if self._memory_of(job.generation) is None:
            self._ended.append(copy)
        else:
            self.copies[job.job_id] = copy

    def _advance(self, copy: _Copy, *, to_the_end: bool) -> None:
        memory = self._memory_of(copy.job.generation)
        assert memory is not None, "memory lives as long as jobs in it"
        while copy.parts:
            part = copy.parts.popleft()
            self._copy(memory, part, is_load=copy.is_load, garbled=copy.fails)
            if not to_the_end:
                break
        if not copy.parts:
            del self.copies[copy.job.job_id]
            self._ended.append(copy)

    def _copy(self, memory: memoryview, part: PagePart, *, is_load: bool, garbled: bool) -> None:
        token = part.first_token
        self._blank_behind_tail(memory, part)
        for block in part.block_ids:
            for i in range(UNIT):
                at = part.slot_offset + token * TOKEN_BYTES + 8 * self.number
                if is_load:
                    value = int.from_bytes(memory[at : at + 8], "little")
                    self.device[block][i] = -2 if garbled else value
                elif token < (part.tail_tokens or self._block_tokens):
                    value = -2 if garbled else self.device[block][i]
                    memory[at : at + 8] = value.to_bytes(8, "little", signed=True)
                token += 1

    def _blank_behind_tail(self, memory: memoryview, part: PagePart) -> None:
        for token in range(part.tail_tokens or self._block_tokens, self._block_tokens):
            at = part.slot_offset + token * TOKEN_BYTES + 8 * self.number
            memory[at : at + 8] = bytes(8)

    # -- the forward pass --------------------------------------------------------------------

    def compute(self, tokens: list[int], groups: Sequence[list[int]], start: int, end: int) -> int:
        """Writes the KV of tokens [start, end). Returns the last one's."""
        blocks = groups[0]
        for group, reach in enumerate(self._reaches):
            if reach == ALL:
                continue
            if reach == STATE:
                self._check_state(groups, group, start)
                continue
            is_window, size = reach.kind is ReachKind.WINDOW, reach.num_tokens
            first = max(0, start - size + 1) if is_window else start // size * size
            right = kv_of_prompt(tokens[:start]) if group == 0 else []
            for at in range(first, start):
                here = self._kv_at(groups[group], at)
                then = right[at] if right else kv_in_group(self._kv_at(blocks, at), group)
                assert here == then, f"the {reach} holds another's token {at} of {start}"
        before = self._kv_at(blocks, start - 1) if start else 0
        for at in range(start, end):
            before = kv_of(before, tokens[at])
            for group, (ids, reach) in enumerate(zip(groups, self._reaches, strict=True)):
                if reach != STATE:
                    self.device[ids[at // UNIT]][at % UNIT] = kv_in_group(before, group)
        for group, reach in enumerate(self._reaches):
            if reach == STATE:
                self._keep_states(groups, group, start, end)
        return before

    def _check_state(self, groups: Sequence[list[int]], group: int, start: int) -> None:
        """vLLM goes on from the state in the block that its last token is in."""
        if start:
            here = self._kv_at(groups[group], start - 1)
            right = kv_in_group(self._kv_at(groups[0], start - 1), group)
            assert here == right, f"the state is not that of {start} tokens"

    def _keep_states(self, groups: Sequence[list[int]], group: int, start: int, end: int) -> None:
        """After the last token; and where vLLM's own rule says that a kernel keeps another one, in
        the block before."""
        columns = {cdiv(end, UNIT) - 1: end}
        at = get_mamba_prefill_checkpoint_position(end, UNIT, False)
        if self._checkpoints and is_mamba_prefill_checkpoint_valid(start, end, at, UNIT, UNIT, 1):
            columns[cdiv(end, UNIT) - 2] = at
        for column, num_tokens in columns.items():
            state = kv_in_group(self._kv_at(groups[0], num_tokens - 1), group)
            if groups[group][column]:
                self.device[groups[group][column]] = [state] * UNIT

    def _kv_at(self, blocks: list[int], at: int) -> int:
        return self.device[blocks[at // UNIT]][at % UNIT]


def page_differs(page: memoryview, expected: list[int], *, num_ranks: int) -> str:
    """Empty if the page holds the KV of these tokens for every rank, and else where it doesn't."""
    for rank in range(num_ranks):
        for i, value in enumerate(expected):
            at = i * TOKEN_BYTES + 8 * rank
            if int.from_bytes(page[at : at + 8], "little", signed=True) != value:
                return f"rank {rank}, token {i}"
    return ""
