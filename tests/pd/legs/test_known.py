"""Prompts of which nothing, or little, is left to compute go to decode alone."""

from __future__ import annotations

import json

import msgspec
import pytest

from tests.pd.conftest import Fleet, answering
from tests.pd.legs.handoff_parts import a_receipt, giving
from ucm import handoff
from ucm.pd.legs.chains import Link, chain_of
from ucm.pd.legs.known import Known
from ucm.pd.legs.prefill import PrefillOutcome

CHAT = "v1/chat/completions"
LONG = "why? " * 400


def receipt(*, is_whole: bool = True) -> bytes:
    return msgspec.json.encode(handoff.params(a_receipt(is_whole=is_whole)))


async def start(fleet: Fleet, num_decode: int = 1, **settings: object) -> None:
    await fleet.start(1, num_decode, **{"known_for_s": 1000.0, **settings})
    fleet.prefill[0].answer = giving(receipt())


async def path_of(fleet: Fleet, path: str, **fields: object) -> str:
    async with await fleet.post(path, **fields) as response:
        assert 200 == response.status
        return response.headers["x-ucm-pd-path"]


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": turns(LONG)}),
        ("v1/completions", {"prompt": LONG}),
        ("v1/completions", {"prompt": list(range(700))}),
        ("v1/responses", {"input": LONG}),
        ("v1/messages", {"messages": turns(LONG), "system": "be kind"}),
        ("inference/v1/generate", {"token_ids": list(range(700)), "sampling_params": {}}),
    ],
)
async def test_a_prompt_that_was_prefilled_is_not_prefilled_again(fleet: Fleet, path, fields):
    await start(fleet, num_decode=2, max_new_tokens=0)

    assert "pd" == await path_of(fleet, path, **fields)
    # What shapes the output alone is another time another one.
    for more in ({}, {"max_tokens": 7, "stream": True, "temperature": 0.5, "seed": 3}):
        async with await fleet.post(path, **fields, **more) as response:
            assert "skip-known" == response.headers["x-ucm-pd-path"]
            assert "known" == response.headers["x-ucm-pd-reason"]
    assert 1 == len(fleet.prefill[0].asked)
    # It finds what there is: no promise is repeated that may be none any more.
    told = [each.handoff for engine in fleet.decode for each in engine.asked]
    promises = (handoff.Receipt, handoff.Expected)
    assert 3 == len(told) and [True] == [True for each in told if isinstance(each, promises)]
    assert 2 == await fleet.metric('ucm_pd_not_prefilled_total{reason="known"}')


async def test_a_turn_of_a_chat_is_prefilled_only_if_much_is_new(fleet: Fleet):
    await start(fleet, max_new_tokens=50)
    first = turns(LONG)
    assert "pd" == await path_of(fleet, CHAT, messages=first)

    # 100 characters are 25 tokens.
    second = turns(LONG, "x" * 80, "y" * 80)
    assert "skip-known" == await path_of(fleet, CHAT, messages=second)
    # What decode has computed counts as new until a prefill says otherwise.
    third = turns(LONG, "x" * 80, "y" * 80, "x" * 80, "y" * 80)
    assert "pd" == await path_of(fleet, CHAT, messages=third)
    assert "skip-known" == await path_of(fleet, CHAT, messages=[*third, *turns("z")])
    # Another branch of it, from a turn on that is known.
    assert "skip-known" == await path_of(fleet, CHAT, messages=[*third[:3], *turns("z")])
    assert "pd" == await path_of(fleet, CHAT, messages=turns(LONG, "x" * 400, "y"))


@pytest.mark.parametrize(
    "other",
    [
        {"messages": turns("how" + LONG)},
        {"messages": [{"role": "system", "content": LONG}]},
        {"messages": turns(LONG), "model": "another"},
        {"messages": turns(LONG), "cache_salt": "s"},
        {"messages": turns(LONG), "tools": [{"type": "function"}]},
        {"messages": turns(LONG), "chat_template": "t"},
        {"messages": turns(LONG), "add_generation_prompt": False},
        {"prompt": LONG},
    ],
)
async def test_whatever_may_change_the_prompt_makes_it_another_one(fleet: Fleet, other):
    await start(fleet)
    assert "pd" == await path_of(fleet, CHAT, messages=turns(LONG))
    assert "pd" == await path_of(fleet, CHAT, **other)


async def test_a_prompt_known_on_one_path_is_none_on_another(fleet: Fleet):
    await start(fleet)
    assert "pd" == await path_of(fleet, CHAT, messages=turns(LONG))
    assert "pd" == await path_of(fleet, "v1/messages", messages=turns(LONG))


@pytest.mark.parametrize(
    "answer",
    [
        answering(b'{"choices": []}'),
        answering(b"{}", status=500),
        giving(receipt(is_whole=False)),
        # Another connector's is for one decode alone.
        giving(b'{"remote_block_ids": [1], "do_remote_prefill": true}'),
        giving(b'{"ucm": {"kind": "receipt", "tokens": 5}}'),
    ],
)
async def test_only_what_our_store_has_as_a_whole_is_known(fleet: Fleet, answer):
    await start(fleet)
    fleet.prefill[0].answer = answer
    for _ in range(2):
        assert "skip-known" != await path_of(fleet, CHAT, messages=turns(LONG))
    assert 2 == len(fleet.prefill[0].asked)


async def test_several_prompts_in_one_request_are_prefilled_each_time(fleet: Fleet):
    await start(fleet)
    for _ in range(2):
        assert "pd" == await path_of(fleet, "v1/completions", prompt=[LONG, LONG])


async def test_without_the_flag_every_prompt_is_prefilled(fleet: Fleet):
    await start(fleet, known_for_s=None)
    for _ in range(2):
        assert "pd" == await path_of(fleet, CHAT, messages=turns(LONG))


def noting(clock: list[float], *, max_known: int = 1000) -> Known:
    return Known(for_s=10.0, max_new_tokens=0, max_known=max_known, clock=lambda: clock[0])


GOOD = PrefillOutcome(None, receipt())


def test_what_is_known_is_forgotten_after_a_while_unless_it_is_prefilled_anew():
    clock = [0.0]
    known, chain = noting(clock), (Link(b"a", 0),)
    known.note(chain, GOOD)
    for now_s, is_known in ((9.9, True), (10.1, False)):
        clock[0] = now_s
        assert is_known == known.has_nearly_all(chain)
    known.note(chain, GOOD)
    clock[0] = 20.0
    assert known.has_nearly_all(chain)


def test_memory_of_what_is_known_has_a_bound_and_the_oldest_goes_first():
    known = noting([0.0], max_known=300)
    for i in range(1000):
        known.note((Link(str(i).encode(), 0),), GOOD)
        assert len(known) <= 300
    assert known.has_nearly_all((Link(b"999", 0),))
    assert not known.has_nearly_all((Link(b"0", 0),))


def test_one_endless_prompt_does_not_take_the_place_of_all_others():
    known = noting([0.0])
    known.note((Link(b"a", 0),), GOOD)
    chain = chain_of({"prompt": "x" * (4 << 20)}, path="/v1/completions")
    assert len(chain) == 4096
    known.note(chain, GOOD)
    assert known.has_nearly_all(chain) and known.has_nearly_all((Link(b"a", 0),))


def test_parts_that_are_cut_otherwise_are_another_prompt():
    def digests(*texts: str) -> set[bytes]:
        chain = chain_of({"messages": turns(*texts)}, path="/")
        return {link.digest for link in chain}

    assert set() == digests("ab", "c") & digests("a", "bc")
    assert 1 == len(digests("ab", "c") & digests("ab", "d"))
    assert json.dumps(turns("ab")) not in str(digests("ab"))
