"""Whatever order vLLM calls in, and however often: nothing raises, and nothing is left behind."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from ucm import handoff as h
from ucm.integration.vllm.metadata import RankReport

NAMES = "abc"
CALLS = st.one_of(
    st.tuples(st.just("new"), st.sampled_from(NAMES), st.sampled_from((1, BLOCK, 70))),
    st.tuples(st.just("match"), st.sampled_from(NAMES), st.sampled_from((0, BLOCK, 3 * BLOCK))),
    st.tuples(st.just("allocate"), st.sampled_from(NAMES), st.sampled_from((0, 1, BLOCK, 64, 999))),
    st.tuples(st.just("step"), st.sampled_from(NAMES), st.sampled_from((0, 1, BLOCK, 70))),
    st.tuples(st.just("finish"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("report"), st.integers(0, 12), st.booleans()),
    st.tuples(st.just("preempt"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("lose"), st.none(), st.none()),
    st.tuples(st.just("reset"), st.none(), st.none()),
)


class Caller:
    def __init__(self, *, layerwise: bool) -> None:
        self.engine = Engine(Loopback(), layerwise=layerwise)
        self.engine.prefill("stored", 70, says=h.Wanted())
        # Requests of the same name may come again, as others.
        for name in NAMES:
            self._make(name, 70)

    def _make(self, name: str, num_tokens: int) -> None:
        request = self.engine.add(name, num_tokens, says=h.Wanted())
        request.status = RequestStatus.FINISHED_ABORTED
        self.engine.side.finished(request, [])
        request.status = RequestStatus.WAITING

    def call(self, what: str, first: object, second: object) -> None:
        getattr(self, what)(first, second)

    def new(self, name: str, num_tokens: int) -> None:
        old = self.engine.requests[name]
        old.status = RequestStatus.FINISHED_ABORTED
        self.engine.side.finished(old, [])
        self.engine.add(name, num_tokens, says=h.Wanted())

    def match(self, name: str, num_computed: int) -> None:
        self.engine.side.matched_tokens(self.engine.requests[name], num_computed)

    def allocate(self, name: str, num_external: int) -> None:
        request = self.engine.requests[name]
        self.engine.side.allocated(request, self.engine.blocks(request), num_external)

    def step(self, name: str, num_tokens: int) -> None:
        self.engine.step({name: num_tokens})

    def finish(self, name: str, has_blocks: bool) -> None:
        request = self.engine.requests[name]
        request.status = RequestStatus.FINISHED_STOPPED
        self.engine.side.finished(request, self.engine.blocks(request) if has_blocks else [])

    def report(self, job_id: int, failed: bool) -> None:
        """Of jobs that nobody knows as well."""
        ended = {job_id: 1}
        self.engine.side.ranks_reported(RankReport(ended, ended if failed else {}))

    def preempt(self, name: str, _: None) -> None:
        request = self.engine.requests[name]
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0

    def lose(self, _: None, __: None) -> None:
        self.engine.link.restart()

    def reset(self, _: None, __: None) -> None:
        self.engine.side.reset()


@settings(max_examples=150, deadline=None)
@given(layerwise=st.booleans(), calls=st.lists(CALLS, max_size=40))
@example(
    layerwise=False,
    calls=[("new", "c", BLOCK), ("lose", None, None), ("step", "c", BLOCK), ("allocate", "c", 1)],
)
def test_no_order_of_calls_raises_or_leaves_anything_behind(
    layerwise: bool, calls: list[tuple[str, object, object]]
):
    caller = Caller(layerwise=layerwise)
    engine = caller.engine
    for call in calls:
        caller.call(*call)
        engine.side._ledger.check()

    for name in NAMES:
        caller.finish(name, has_blocks=False)
    for _ in range(4):
        engine.step({})
        for job_id in range(200):
            caller.report(job_id, failed=False)
    engine.step({})
    assert not engine.side._states
    assert not len(engine.side._ledger)
    assert not engine.side._ends
    assert engine.slots()["pins"] == engine.slots()["filling"] == 0
