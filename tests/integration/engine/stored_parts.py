"""A prompt of ten blocks, and what of it is stored by models with several strands."""

from __future__ import annotations

from tests.integration.scheduler_parts import BLOCK, Engine
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.integration.copies.jobs import CopyJob
from ucm.store.blocks.keys import Key, strand_key

PROMPT = 10 * BLOCK


def strand_keys(engine: Engine, name: str, strand: str) -> list[Key]:
    """Of a request's prompt, in a strand beside the first."""
    keys = engine.side._states[name].prompt.keys
    return [strand_key(key, strand, is_salted=False) for key in keys]


def stored(tier: MemoryTier) -> set[Key]:
    return {key for _, key in tier._pages}


def damage(tier: MemoryTier, key: Key) -> None:
    (at,) = [each for each in tier._pages if each[1] == key]
    tier._pages[at] = b"cut short"


def parts_of(job: CopyJob, target: int) -> list[tuple[int, ...]]:
    return [part.block_ids for part in job.parts if part.target == target]


def prefill_by_twos(
    engine: Engine, num_tokens: int = PROMPT, **says: h.Handoff
) -> dict[str, object] | None:
    """Two blocks a step, as a long prompt is computed. Returns the receipt."""
    request = engine.add("r", num_tokens, **says)
    engine.admit(request)
    while request.num_computed_tokens < num_tokens:
        engine.step({"r": min(2 * BLOCK, num_tokens - request.num_computed_tokens)})
    return engine.end(request)
