"""Which blocks of a request are to be stored, of each strand: of its prompt, and of what is
answered to it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ucm.integration.engine.dump_state import StrandDump
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import DumpCursor
from ucm.integration.engine.state_dumps import StateCursor
from ucm.store.blocks.strands import STATE, kept_blocks, needed_blocks


def of_prompt(
    prompt: Prompt,
    facts: EngineFacts,
    namespaces: Sequence[int],
    *,
    of_base: Iterable[int],
    num_computed: int,
    interval_tokens: int,
) -> list[StrandDump]:
    """Of the base these blocks, and what is kept of strands that don't need every block, as far as
    vLLM has it, which begins with `num_computed` tokens."""
    made = []
    for number, namespace in enumerate(namespaces):
        is_base, reach = number == 0 and facts.has_base, facts.strands[number].reach
        todo = (
            of_base
            if is_base
            else _kept_of(prompt, number, facts, num_computed, interval_tokens=interval_tokens)
        )
        cursor = (
            StateCursor(todo, len(prompt.keys))
            if reach == STATE
            else DumpCursor(todo, len(prompt.keys), goes_on_behind_holes=not is_base)
        )
        made.append(StrandDump(prompt, number, reach, namespace, cursor))
    return made


def _kept_of(
    prompt: Prompt, strand: int, facts: EngineFacts, num_computed: int, *, interval_tokens: int
) -> list[int]:
    """Nothing that lies further back than what the first token needs that is to be computed."""
    reach = facts.strands[strand].reach
    kept = kept_blocks(
        reach,
        prompt.num_tokens,
        len(prompt.keys),
        prompt.block_tokens,
        interval_tokens,
        with_states=facts.has_states,
    )
    first = needed_blocks(reach, num_computed, prompt.block_tokens).start
    return sorted(block for block in kept if block >= first)


def of_answer(prompt: Prompt, facts: EngineFacts, namespaces: Sequence[int]) -> list[StrandDump]:
    """Of what is answered to `prompt` every whole block, the first of which the prompt begins.
    Where there are windows too: nobody knows which of them is the last one, and what lies before
    it the engine has no more then."""
    start = prompt.full_blocks
    return [
        StrandDump(
            prompt,
            number,
            strand.reach,
            namespace,
            DumpCursor((), start, goes_on_behind_holes=number > 0 or not facts.has_base),
        )
        for number, (strand, namespace) in enumerate(zip(facts.strands, namespaces, strict=True))
    ]
