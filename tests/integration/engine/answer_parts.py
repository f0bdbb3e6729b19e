"""A request that is answered, and the next turn of its conversation."""

from __future__ import annotations

from types import SimpleNamespace

from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import Engine
from ucm import handoff as h


def stored_pages(engine: Engine) -> float:
    return engine.link.core.counters["dump_committed"]


def begin(engine: Engine, num_tokens: int, *, says: h.Handoff | None = None) -> SimpleNamespace:
    """A request whose prompt is computed, and which has its first token."""
    request = engine.add("a", num_tokens, says=says)
    extra = engine.admit(request)
    if extra:
        engine.copied(*(job.job_id for job in engine.step({}).loads))
    engine.step({"a": num_tokens - request.num_computed_tokens})
    engine.copied(*engine.take_dumping())
    return request


def finish(engine: Engine, request: SimpleNamespace) -> object:
    request.all_token_ids.append(7)
    request.num_tokens += 1
    request.status = RequestStatus.FINISHED_STOPPED
    return engine.end(request)


def found_by_next_turn(engine: Engine, request: SimpleNamespace, *, more: int = 0) -> int:
    """How much of the conversation a new request finds that asks so much more."""
    follower = engine.add("b", request.num_tokens + more)
    follower.prompt_token_ids = [*request.all_token_ids, *range(9000, 9000 + more)]
    # Named when it came.
    engine.side._states.pop("b")
    engine.side.on_new_request(follower)
    return engine.admit(follower)
