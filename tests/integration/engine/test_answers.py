"""What is answered is stored as a prompt is, named as the prompt that goes on with it."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.integration.engine.answer_parts import (
    begin,
    finish,
    found_by_next_turn,
    stored_pages,
)
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm.integration.engine.prompt import NamedItems, Prompt, named_prompt
from ucm.store.blocks.keys import Item

_FINGERPRINT = bytes(32)


def _prompt(tokens: list[int], items: tuple[Item, ...], salt: str | None, *, tail: bool) -> Prompt:
    request = SimpleNamespace(
        request_id="r",
        num_prompt_tokens=len(tokens),
        prompt_token_ids=tokens,
        prompt_embeds=None,
        resumable=False,
        lora_request=None,
        cache_salt=salt,
    )
    return named_prompt(
        request,
        fingerprint=_FINGERPRINT,
        block_tokens=BLOCK,
        named=NamedItems(items),
        with_tail=tail,
    )


@given(
    num_prompt=st.integers(1, 5 * BLOCK),
    grows=st.lists(st.integers(1, 3 * BLOCK), max_size=4),
    item=st.one_of(st.none(), st.tuples(st.integers(0, 4 * BLOCK), st.integers(1, 2 * BLOCK))),
    salt=st.one_of(st.none(), st.just("s")),
    tail=st.booleans(),
)
def test_a_prompt_that_grows_has_the_names_of_the_prompt_that_holds_the_answer(
    num_prompt: int,
    grows: list[int],
    item: tuple[int, int] | None,
    salt: str | None,
    tail: bool,
):
    tokens = list(range(num_prompt + sum(grows)))
    items = ()
    if item is not None and item[0] < num_prompt:
        items = (Item("picture", item[0], min(item[1], num_prompt - item[0])),)
    grown = _prompt(tokens[:num_prompt], items, salt, tail=tail)

    end = num_prompt
    for more in grows:
        end += more
        grown = grown.grown(tokens[grown.full_blocks * BLOCK : end])

    # The next turn's prompt, which the engine is given as a whole.
    next_turn = _prompt(tokens, items, salt, tail=False)
    assert grown.keys[: grown.full_blocks] == next_turn.keys[: grown.full_blocks]
    if grows:
        assert grown.keys == next_turn.keys
        assert (grown.tail_tokens, grown.num_tokens) == (0, len(tokens))


def test_a_block_that_is_answered_is_stored_while_the_answer_goes_on():
    engine = Engine(Loopback())
    request = begin(engine, 2 * BLOCK + 5)
    assert stored_pages(engine) == 2

    engine.answer(request, BLOCK)
    assert stored_pages(engine) == 3
    engine.answer(request, BLOCK)

    assert stored_pages(engine) == 4
    assert found_by_next_turn(engine, request) == 4 * BLOCK


def test_the_last_block_is_stored_when_the_answer_ends():
    engine = Engine(Loopback())
    request = begin(engine, BLOCK)
    # The last token of the second block is sampled: it is none of the KV that there is.
    engine.answer(request, BLOCK - 1)
    finish(engine, request)
    assert stored_pages(engine) == 1

    engine = Engine(Loopback())
    request = begin(engine, BLOCK)
    engine.answer(request, BLOCK)
    finish(engine, request)
    assert stored_pages(engine) == 2


def test_with_store_generated_off_nothing_of_the_answer_is_stored():
    engine = Engine(Loopback(), store_generated=False)
    request = begin(engine, 2 * BLOCK)
    engine.answer(request, 3 * BLOCK)
    finish(engine, request)

    assert stored_pages(engine) == 2


def test_with_store_generated_end_the_answer_is_stored_when_it_ends():
    engine = Engine(Loopback(), store_generated="end")
    request = begin(engine, 2 * BLOCK)
    engine.answer(request, 3 * BLOCK)
    assert stored_pages(engine) == 2
    finish(engine, request)

    assert stored_pages(engine) == 5


def test_an_engine_that_only_loads_stores_no_answers_either():
    tier = MemoryTier()
    Engine(Loopback(tier=tier)).prefill("p", 2 * BLOCK + 5)
    engine = Engine(Loopback(tier=tier), dumps=False)
    request = begin(engine, 2 * BLOCK + 5)
    engine.answer(request, 2 * BLOCK)
    finish(engine, request)

    assert stored_pages(engine) == 0


def test_what_is_answered_to_a_prompt_of_less_than_a_block_is_stored():
    engine = Engine(Loopback())
    request = begin(engine, 3)
    engine.answer(request, 2 * BLOCK)
    finish(engine, request)

    assert stored_pages(engine) == 2


def test_guesses_that_were_not_found_right_are_not_stored():
    engine = Engine(Loopback())
    request = begin(engine, BLOCK)
    # vLLM has scheduled guesses as far as two blocks, and counts them before it knows.
    request.num_computed_tokens = 3 * BLOCK
    engine.step({"a": 1})
    finish(engine, request)

    assert stored_pages(engine) == 1


def test_a_block_is_stored_once_its_tokens_are_known_where_vllm_schedules_ahead():
    """Of a step that is under way the engine doesn't know the token, and counts it."""
    engine = Engine(Loopback())
    request = begin(engine, BLOCK)

    def step_ahead() -> None:
        engine.step({"a": 1})
        engine.copied(*engine.take_dumping())
        request.all_token_ids.append(1000 + request.num_tokens)
        request.num_tokens += 1

    for _ in range(BLOCK + 2):
        step_ahead()
        assert stored_pages(engine) == 1
    # The step before it has asked for a slot.
    step_ahead()

    assert stored_pages(engine) == 2
    assert found_by_next_turn(engine, request) == 2 * BLOCK


def test_an_answer_behind_what_found_no_room_is_not_stored():
    engine = Engine(Loopback(num_slots=4))
    request = begin(engine, 2 * BLOCK)
    # Its slots stay, as long as nobody copies.
    other = engine.add("c", 4 * BLOCK, salt="another's")
    engine.admit(other)
    engine.step({"c": 4 * BLOCK})
    engine.take_dumping()
    engine.answer(request, BLOCK + 2)
    other.status = RequestStatus.FINISHED_ABORTED
    engine.side.finished(other, ())
    engine.answer(request, 2 * BLOCK)
    receipt = finish(engine, request)

    assert (stored_pages(engine), receipt) == (2, None)
    engine.link.core.check()


def test_an_answer_to_a_prompt_that_found_no_room_is_not_stored():
    engine = Engine(Loopback(num_slots=4))
    other = engine.add("c", 3 * BLOCK, salt="another's")
    engine.admit(other)
    engine.step({"c": 3 * BLOCK})
    engine.take_dumping()
    request = begin(engine, 2 * BLOCK)
    other.status = RequestStatus.FINISHED_ABORTED
    engine.side.finished(other, ())
    engine.answer(request, 2 * BLOCK + 2)
    finish(engine, request)

    assert stored_pages(engine) == 1
    engine.link.core.check()


def test_a_window_is_stored_with_each_block_that_is_answered():
    engine = Engine(Loopback(), window=BLOCK + 1)
    request = begin(engine, 2 * BLOCK)
    stored = stored_pages(engine)
    engine.answer(request, 2 * BLOCK + 2)
    assert stored_pages(engine) == stored + 4
    finish(engine, request)

    assert found_by_next_turn(engine, request) == 4 * BLOCK


def test_a_model_with_states_stores_no_answers():
    engine = Engine(Loopback(), states=True)
    request = begin(engine, 2 * BLOCK)
    stored = stored_pages(engine)
    engine.answer(request, 2 * BLOCK)
    finish(engine, request)

    assert stored_pages(engine) == stored


def test_a_preempted_answer_begins_anew():
    engine = Engine(Loopback())
    request = begin(engine, BLOCK)
    engine.answer(request, BLOCK // 2)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    engine.step({})
    extra, _ = engine.side.matched_tokens(request, 0)
    engine.step({})
    extra, _ = engine.side.matched_tokens(request, 0)
    engine.side.allocated(request, engine.blocks(request), extra or 0)
    if extra:
        engine.copied(*(job.job_id for job in engine.step({}).loads))
    request.num_computed_tokens, request.status = extra, RequestStatus.RUNNING
    engine.step({"a": request.num_tokens - extra})
    engine.copied(*engine.take_dumping())
    engine.answer(request, BLOCK)
    finish(engine, request)

    assert found_by_next_turn(engine, request) == 2 * BLOCK
    engine.link.core.check()
