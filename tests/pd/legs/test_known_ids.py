"""Conversations of token ids, of whose answers decode has said that they are stored."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.pd.conftest import Answer, Fleet
from tests.pd.legs.handoff_parts import a_receipt, giving
from ucm import handoff
from ucm.pd.legs.ends import Ends, Mark
from ucm.pd.legs.known import Known, chain_of, marks_of

COMPLETIONS, GENERATE = "v1/completions", "inference/v1/generate"
QUESTION, ANSWER = 60, 700
all_lengths = some.integers(0, 1200)


def told(tokens: int) -> Answer:
    words = msgspec.structs.replace(a_receipt(is_whole=True), tokens=tokens)
    return giving(msgspec.json.encode(handoff.params(words)))


def marks(ids: list[int]) -> tuple[Mark, ...]:
    fields = {"prompt": ids}
    return marks_of(fields, chain_of(fields, path="/"))


def remembering(clock: list[float], *, max_new_tokens: int = 100, max_known: int = 1000) -> Known:
    return Known(
        for_s=10.0, max_new_tokens=max_new_tokens, max_known=max_known, clock=lambda: clock[0]
    )


@given(all_lengths, all_lengths, some.integers(0, 3000))
def test_a_prompt_is_known_if_it_begins_with_all_of_another_and_little_is_not_stored(
    length, more, stored
):
    known = remembering([0.0])
    first = [1] * length
    known.answered(marks(first), stored)
    longer = [*first, *[2] * more]

    # Of less than a part nothing is remembered, and where nothing is stored nothing is known.
    expected = length >= 256 and stored > 0 and len(longer) - stored <= 100
    assert expected == known.has_nearly_all((), marks(longer))


@given(some.integers(257, 1200), some.data())
def test_another_id_anywhere_in_it_makes_it_another_prompt(length, data):
    known = remembering([0.0])
    ids = list(range(length))
    known.answered(marks(ids), 10_000)
    assert known.has_nearly_all((), marks(ids))
    ids[data.draw(some.integers(0, length - 1))] = 5000

    assert not known.has_nearly_all((), marks(ids))
    assert not known.has_nearly_all((), marks(list(range(length - 1))))


def test_it_is_forgotten_after_a_while_and_the_oldest_first():
    clock = [0.0]
    known = remembering(clock, max_known=3)
    for number in range(9):
        known.answered(marks([number] * 300), 300)
        assert len(known) <= 3
    assert [number >= 6 for number in range(9)] == [
        known.has_nearly_all((), marks([number] * 300)) for number in range(9)
    ]
    clock[0] = 10.1
    assert not known.has_nearly_all((), marks([8] * 300))


def test_texts_and_chats_have_no_marks():
    for fields in ({"prompt": "x" * 9000}, {"messages": [{"role": "user", "content": "x"}]}):
        assert () == marks_of(fields, chain_of(fields, path="/"))
    assert 0 == Ends(9).stored_tokens((), now_s=0.0)


@pytest.mark.parametrize(
    ("path", "name", "more"),
    [(COMPLETIONS, "prompt", {}), (GENERATE, "token_ids", {"sampling_params": {}})],
)
async def test_a_conversation_of_ids_goes_on_at_decode_alone_once_its_answers_are_kept(
    fleet: Fleet, path: str, name: str, more: dict
):
    await fleet.start(1, 1, known_for_s=1000.0, max_new_tokens=QUESTION + 128)
    fleet.prefill[0].answer = told(129)
    said, paths = [1] * 500, []
    for turn in range(4):
        fleet.decode[0].answer = told((len(said) + ANSWER) // 128 * 128)
        async with await fleet.post(path, **{name: said}, **more) as response:
            assert 200 == response.status
            paths.append(response.headers["x-ucm-pd-path"])
        said = [*said, *[turn] * (ANSWER + QUESTION)]

    assert ["pd", *["skip-known"] * 3] == paths
    assert 3 == await fleet.metric('ucm_pd_not_prefilled_total{reason="known"}')


async def test_without_kept_answers_every_turn_of_ids_is_prefilled(fleet: Fleet):
    await fleet.start(1, 1, known_for_s=1000.0, max_new_tokens=QUESTION + 128)
    fleet.prefill[0].answer = told(129)
    said = [1] * 500
    for turn in range(3):
        fleet.decode[0].answer = told(len(said) // 128 * 128)
        async with await fleet.post(COMPLETIONS, prompt=said) as response:
            assert "pd" == response.headers["x-ucm-pd-path"]
        said = [*said, *[turn] * (ANSWER + QUESTION)]
