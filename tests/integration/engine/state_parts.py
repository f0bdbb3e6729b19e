"""Engines of models with states, and a prompt that one of them computes."""

from __future__ import annotations

from tests.integration.engine.stored_parts import PROMPT, strand_keys
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.integration.copies.jobs import CopyJob
from ucm.store.blocks.keys import Key

# The last end of a block that leaves a token to compute.
LAST = 9 * BLOCK


def started(tier: MemoryTier) -> Engine:
    return Engine(Loopback(tier=tier), states=True)


def offer(engine: Engine, name: str, num_tokens: int) -> None:
    """In the next step vLLM has the states of both groups after so many tokens."""
    block = num_tokens // BLOCK - 1
    engine.offers[name] = [(group, 101 + 100 * group + block, num_tokens) for group in (1, 2)]


def state_keys(engine: Engine, name: str) -> list[Key]:
    return strand_keys(engine, name, "s")


def prefill(
    engine: Engine,
    *,
    name: str = "r",
    num_tokens: int = PROMPT,
    at: tuple[int, ...] = (LAST,),
    says: h.Handoff | None = None,
) -> tuple[list[CopyJob], h.Handoff | None]:
    """A block a step. Returns the copies, and the receipt."""
    request = engine.add(name, num_tokens, says=says)
    engine.admit(request)
    loads = [job.job_id for job in engine.step({}).loads]
    if loads:
        engine.copied(*loads)
    jobs: list[CopyJob] = []
    while request.num_computed_tokens < num_tokens:
        end = request.num_computed_tokens + BLOCK
        if end in at:
            offer(engine, name, end)
        step = engine.step({name: min(BLOCK, num_tokens - end + BLOCK)})
        jobs += step.dumps
        at_once = {job.job_id for job in step.dumps for part in job.parts if part.target}
        assert set(step.at_once) == at_once, "a state may be gone in the next step"
    _, receipt = engine.side.finished(request, engine.blocks(request))
    jobs += engine.step({}).dumps
    engine.copied(*engine.take_dumping())
    engine.step({})
    return jobs, h.parse(receipt)


def state_keys_of(engine: Engine) -> list[Key]:
    engine.add("s", PROMPT)
    return state_keys(engine, "s")
