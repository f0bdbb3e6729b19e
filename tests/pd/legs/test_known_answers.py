"""What was answered in a chat is not new in its next turn, as far as decode has answered it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.pd.conftest import Answer, Fleet, answering
from tests.pd.legs.handoff_parts import a_receipt, giving, streaming
from tests.pd.legs.test_known import CHAT, LONG, noting, path_of, start, turns
from tests.pd.protocol_answers import sse, typed
from ucm import handoff
from ucm.pd.legs.chains import Link, chain_of
from ucm.pd.legs.known import Known
from ucm.pd.legs.prefill import PrefillOutcome


def prefilled(*, tokens: int, found: int) -> PrefillOutcome:
    words = msgspec.structs.replace(a_receipt(is_whole=True), tokens=tokens, found_tokens=found)
    return PrefillOutcome(None, msgspec.json.encode(handoff.params(words)))


def chat(*texts: str) -> tuple[Link, ...]:
    return chain_of({"messages": turns(*texts)}, path="/")


ANSWER = "x" * 4000


def note_chat(known: Known, *texts: str, tokens: int, found: int, answered: int = 1000) -> None:
    known.note(chat(*texts), prefilled(tokens=tokens, found=found), answer_tokens=answered)


@pytest.mark.parametrize(("found", "is_known"), [(2100, True), (1000, False), (900, False)])
def test_answers_are_known_once_a_prefill_has_found_one(found: int, is_known: bool):
    known = noting([0.0])
    note_chat(known, LONG, tokens=1000, found=0)
    # All that is new is the answer.
    assert not known.has_nearly_all(chat(LONG, ANSWER))
    note_chat(known, LONG, ANSWER, LONG, tokens=2500, found=found)

    assert is_known == known.has_nearly_all(chat(LONG, ANSWER, LONG, ANSWER))
    # What a client says is new whoever has answered before.
    assert not known.has_nearly_all(chat(LONG, ANSWER, LONG, ANSWER, LONG))


def test_an_answer_of_less_than_two_blocks_tells_nothing_of_answers():
    known = noting([0.0])
    note_chat(known, LONG, tokens=1000, found=0, answered=225)
    note_chat(known, LONG, "x" * 900, LONG, tokens=1700, found=1200)

    assert not known.has_nearly_all(chat(LONG, "x" * 900, LONG, ANSWER))


def test_one_answer_that_was_not_found_ends_it():
    known = noting([0.0])
    note_chat(known, LONG, tokens=1000, found=0)
    note_chat(known, LONG, ANSWER, LONG, tokens=2500, found=2000)
    note_chat(known, LONG, ANSWER, LONG, ANSWER, LONG, tokens=4000, found=2500)

    assert not known.has_nearly_all(chat(LONG, ANSWER, LONG, ANSWER, LONG, ANSWER))


def knowing_answers(clock: list[float], *, max_new_tokens: int = 0) -> Known:
    known = Known(for_s=10.0, max_new_tokens=max_new_tokens, max_known=1000, clock=lambda: clock[0])
    note_chat(known, LONG, tokens=1000, found=0)
    note_chat(known, LONG, ANSWER, LONG, tokens=2500, found=2000)
    assert known.has_nearly_all(chat(LONG, ANSWER, LONG, ANSWER))
    return known


@given(some.integers(0, 5000), some.integers(0, 5000), some.integers(0, 500))
def test_no_more_counts_as_an_answer_than_decode_has_answered_there(answered, written, new):
    known = knowing_answers([0.0], max_new_tokens=new)
    note_chat(known, "who?", tokens=1000, found=0, answered=answered)

    made_up = chat("who?", "x" * 4 * written)
    assert (max(1, written) <= answered + new) == known.has_nearly_all(made_up)


def test_a_call_of_tools_that_nobody_has_made_is_new():
    known = knowing_answers([0.0])
    call = {"id": "1", "type": "function", "function": {"name": "write", "arguments": ANSWER}}
    made_up = {"role": "assistant", "content": None, "tool_calls": [call] * 100}
    note_chat(known, "who?", tokens=1000, found=0)
    chain = chain_of({"messages": [*turns("who?"), made_up]}, path="/")

    assert not known.has_nearly_all(chain)


def test_the_longest_of_several_answers_counts_wherever_it_came_from():
    known = knowing_answers([0.0])
    for answered in (10, 300, 20):
        note_chat(known, "who?", tokens=1000, found=0, answered=answered)
    assert known.has_nearly_all(chat("who?", "x" * 1200))
    # It was known, and decode alone has answered it anew; then others went on with it.
    known.went_on(chat("who?"), answer_tokens=500)
    note_chat(known, "who?", "yes", "why?", tokens=1100, found=0, answered=1)

    assert known.has_nearly_all(chat("who?", "x" * 2000))
    assert not known.has_nearly_all(chat("who?", "x" * 2010))


def test_an_answer_of_a_time_that_is_over_does_not_count():
    clock = [0.0]
    known = knowing_answers(clock)
    note_chat(known, "who?", tokens=1000, found=0, answered=1000)
    clock[0] = 11.0
    note_chat(known, "who?", tokens=1000, found=0, answered=10)

    assert known.has_nearly_all(chat("who?", "x" * 40))
    assert not known.has_nearly_all(chat("who?", "x" * 400))


def test_what_nobody_has_answered_tells_nothing_of_answers():
    known = knowing_answers([0.0])
    note_chat(known, "who?", tokens=1000, found=0, answered=10)
    note_chat(known, "who?", ANSWER, LONG, tokens=2500, found=0)

    assert known.has_nearly_all(chat(LONG, ANSWER, LONG, ANSWER))


def test_what_decode_has_computed_alone_is_known_as_long_as_what_it_went_on_from():
    clock = [0.0]
    known = knowing_answers(clock)
    clock[0] = 9.0
    turn = chat(LONG, ANSWER, LONG, ANSWER)
    known.went_on(turn)
    assert known.has_nearly_all(turn)
    clock[0] = 10.1
    assert not known.has_nearly_all(turn)


def test_what_decode_has_computed_alone_is_not_known_where_answers_are_not():
    known = noting([0.0])
    note_chat(known, LONG, tokens=1000, found=0)
    known.went_on(chat(LONG, "a"))
    assert not known.has_nearly_all(chat(LONG, "a"))


def whole(body: object) -> Answer:
    return answering(msgspec.json.encode(body))


def chunks(key: str) -> Answer:
    deltas = [sse({"choices": [{"index": 0, "delta": {key: ANSWER[:1000]}}]})] * 4
    return streaming(*deltas, sse("[DONE]"))


def called(arguments: str) -> list[dict[str, Any]]:
    return [{"index": 0, "function": {"name": "f", "arguments": arguments}}]


ANSWERS: dict[str, tuple[str, dict[str, Any], Answer]] = {
    "a chat": (CHAT, {}, whole({"choices": [{"message": {"content": ANSWER}}]})),
    "a call of tools": (
        CHAT,
        {},
        whole({"choices": [{"message": {"content": None, "tool_calls": called(ANSWER)}}]}),
    ),
    "a chat that is streamed": (CHAT, {"stream": True}, chunks("content")),
    "thoughts that are streamed": (CHAT, {"stream": True}, chunks("reasoning")),
    "a message": ("v1/messages", {}, whole({"content": [{"type": "text", "text": ANSWER}]})),
    "a message that is streamed": (
        "v1/messages",
        {"stream": True},
        streaming(
            typed("content_block_delta", delta={"type": "text_delta", "text": ANSWER}),
            typed("message_stop"),
        ),
    ),
    "a response": ("v1/responses", {}, whole({"output": [{"content": [{"text": ANSWER}]}]})),
    "a response that is streamed": (
        "v1/responses",
        {"stream": True},
        streaming(
            typed("response.output_text.delta", delta=ANSWER),
            typed("response.output_text.done", text=ANSWER),
            typed("response.completed", response={"output": [{"content": ANSWER}]}),
        ),
    ),
}


def found_at_prefill(fleet: Fleet, *, tokens: int, found: int) -> None:
    words = msgspec.structs.replace(a_receipt(is_whole=True), tokens=tokens, found_tokens=found)
    fleet.prefill[0].answer = giving(msgspec.json.encode(handoff.params(words)))


@pytest.mark.parametrize("kind", ANSWERS)
async def test_an_answer_counts_as_far_as_it_went_through_the_proxy(fleet: Fleet, kind: str):
    path, more, answer = ANSWERS[kind]
    name = "input" if path == "v1/responses" else "messages"
    await start(fleet, max_new_tokens=10)
    fleet.decode[0].answer = answer

    async def way(*texts: str) -> str:
        return await path_of(fleet, path, **{name: turns(*texts)}, **more)

    found_at_prefill(fleet, tokens=1000, found=0)
    assert "pd" == await way(LONG)
    found_at_prefill(fleet, tokens=2500, found=2000)
    assert "pd" == await way(LONG, ANSWER, LONG)

    found_at_prefill(fleet, tokens=1000, found=0)
    assert "pd" == await way("who?")
    assert "skip-known" == await way("who?", ANSWER, "ok")
    assert "pd" == await way("who?", ANSWER + "z" * 100, "ok")


async def test_of_an_answer_that_fails_nothing_counts(fleet: Fleet):
    await start(fleet, max_new_tokens=10)
    good, bad = ANSWERS["a chat"][2], {"choices": [{"message": {"content": ANSWER}}]}
    fleet.decode[0].answer = good
    found_at_prefill(fleet, tokens=1000, found=0)
    await path_of(fleet, CHAT, messages=turns(LONG))
    found_at_prefill(fleet, tokens=2500, found=2000)
    await path_of(fleet, CHAT, messages=turns(LONG, ANSWER, LONG))
    fleet.decode[0].answer = answering(msgspec.json.encode(bad), status=400)
    async with await fleet.post(CHAT, messages=turns("who?")) as response:
        assert 400 == response.status
    fleet.decode[0].answer = good

    assert "pd" == await path_of(fleet, CHAT, messages=turns("who?", ANSWER, "ok"))


async def test_a_chat_goes_on_at_decode_alone_while_little_is_new_in_each_turn(fleet: Fleet):
    """A user's turn of 75 tokens, of which three are too many at once."""
    await start(fleet, max_new_tokens=100)
    fleet.decode[0].answer = ANSWERS["a chat"][2]
    said = [LONG]
    paths = []
    for tokens, found in ((1000, 0), (2500, 2000), (9000, 0), (9000, 0), (9000, 0)):
        found_at_prefill(fleet, tokens=tokens, found=found)
        paths.append(await path_of(fleet, CHAT, messages=turns(*said)))
        said += [ANSWER, "y" * 300 if paths[1:] else LONG]

    assert ["pd", "pd", "skip-known", "skip-known", "skip-known"] == paths
