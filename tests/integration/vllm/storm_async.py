"""The same storm where vLLM schedules ahead: a step is scheduled while the one before it runs, or
before it has begun, and its end is heard of later. The ranks know first what comes of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from tests.integration.vllm.storm import Storm, _sampled


@dataclass(eq=False)
class _Step:
    """What the ranks are told of a step: of each request the tokens [start, end), its blocks, and
    how many tokens there must be before one is sampled. `held`: everybody's blocks."""

    output: Any
    work: dict[str, tuple[int, int, tuple[list[int], ...], int]]
    held: dict[str, set[int]]
    # Once it has run.
    sampled: dict[str, list[int]] | None = None
    reports: Any = None


class AsyncStorm(Storm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: deque[_Step] = deque()
        # As the ranks know them.
        self._tokens_of: dict[str, list[int]] = {}
        self._prefill: dict[str, int] = {}

    def step(self) -> None:
        self.clock.now_s += self.rng.choice((0.0, 0.001, 0.01))
        self._steps.append(self._schedule())
        may_wait = len(self._steps) == 1 and self.rng.random() < 0.6 and not self.node.calm
        for step in self._steps:
            if step.reports is None and not (may_wait and step is self._steps[-1]):
                self._run(step)
        if len(self._steps) > 1 or self.node.calm:
            self._hear(self._steps.popleft())
        self.node.tick(self._used_generations() | self._told_generations())
        self.side._ledger.check()

    def _told_generations(self) -> set[int]:
        told = set()
        for step in self._steps:
            metadata = step.output.kv_connector_metadata
            if step.reports is None:
                told |= {job.generation for job in (*metadata.loads, *metadata.dumps)}
        return told

    def _schedule(self) -> _Step:
        output = self.scheduler.schedule()
        manager, requests = self.scheduler.kv_cache_manager, self.scheduler.requests
        again = {each.req_id for each in output.scheduled_new_reqs}
        again |= set(output.scheduled_cached_reqs.resumed_req_ids)
        work = {}
        for name, count in output.num_scheduled_tokens.items():
            request = requests[name]
            if name in again:
                self._prefill[name] = request.num_tokens
                self._tokens_of.setdefault(name, list(request.prompt_token_ids))
            end = request.num_computed_tokens
            blocks = tuple([*group] for group in manager.get_block_ids(name))
            work[name] = (end - count, end, blocks, self._prefill[name])
        held = {name: set().union(*manager.get_block_ids(name)) - {0} for name in requests}
        return _Step(output, work, held)

    def _run(self, step: _Step) -> None:
        metadata = step.output.kv_connector_metadata
        for rank in self.ranks:
            rank.fence(metadata)
        for rank in self.ranks:
            for copy in rank.copies.values():
                name = copy.job.request_id
                assert copy.blocks <= step.held.get(name, set()), f"{name}: blocks of others"
        step.sampled = {}
        for name, (start, end, blocks, prefill) in step.work.items():
            tokens = self._tokens_of[name]
            values = {rank.compute(tokens, blocks, start, end) for rank in self.ranks}
            assert len(values) == 1
            token = _sampled(values.pop())
            step.sampled[name] = [token] if end >= prefill else []
            if end >= prefill and end == len(tokens):
                tokens.append(token)
        for rank in self.ranks:
            rank.submit(metadata)
            rank.run_some()
        step.reports = [rank.report(metadata, all_of_them=self.node.calm) for rank in self.ranks]

    def _hear(self, step: _Step) -> None:
        assert step.sampled is not None
        self._end(step.output, step.sampled, step.reports)
        for rank in self.ranks:
            rank.run_some()
