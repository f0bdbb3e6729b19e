"""A conversation goes where its pages lie in memory, as long as that is not much busier."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from yarl import URL

from tests.pd.conftest import Fleet, answering, until
from ucm.pd.fleet.affinity import Homes, Prefix, choose
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.pool import Pool, PoolRules
from ucm.pd.legs.chains import chain_of, prefix_of

CHAT = "v1/chat/completions"
SYSTEM = {"role": "system", "content": "You are kind. " * 200}
URLS = [URL(f"http://10.0.0.{i}:{port}") for i in range(1, 5) for port in (1, 2)]
all_loads = some.dictionaries(some.sampled_from(URLS), some.integers(0, 30), min_size=1)


def turns(first: str, number: int) -> list[dict[str, str]]:
    said = [SYSTEM, {"role": "user", "content": first}]
    for turn in range(number):
        said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"{turn}?"}]
    return said


def prefix(**fields: object) -> Prefix:
    found = prefix_of(fields, chain_of(fields, path="/v1/chat/completions"))
    assert found is not None
    return found


# -- the choice ------------------------------------------------------------------------------------


@given(all_loads, some.none() | some.sampled_from(URLS), some.binary(), some.integers(0, 10))
def test_the_chosen_one_is_there_and_never_further_ahead_than_it_may_be(
    loads, home, opening, ahead
):
    chosen = choose(loads, home=home, opening=opening, max_ahead=ahead)

    least = min(loads.values())
    assert loads[chosen] <= least + ahead
    within = {url for url, load in loads.items() if load <= least + ahead}
    if home in within:
        assert home == chosen
    elif home is not None and home.host in {url.host for url in within}:
        assert home.host == chosen.host


@given(all_loads, some.binary(), some.randoms())
def test_proxies_that_know_nothing_of_each_other_choose_the_same_one(loads, opening, random):
    others = list(loads.items())
    random.shuffle(others)

    first, second = Homes(max_ahead=30, max_places=9), Homes(max_ahead=30, max_places=9)
    wanted = Prefix([b"1"], opening)
    assert first.choose(wanted, loads) == second.choose(wanted, dict(others))


@given(some.lists(some.binary(min_size=16, max_size=16), min_size=50, max_size=50, unique=True))
def test_when_one_goes_only_what_was_there_moves(openings):
    loads = dict.fromkeys(URLS, 0)
    gone = URLS[0]
    before = {each: choose(loads, home=None, opening=each, max_ahead=0) for each in openings}
    del loads[gone]

    for each, chosen in before.items():
        after = choose(loads, home=None, opening=each, max_ahead=0)
        assert after != gone
        assert chosen in (after, gone)


def test_openings_are_spread_over_all():
    loads = dict.fromkeys(URLS, 0)
    found = Counter(
        choose(loads, home=None, opening=b"%d" % i, max_ahead=0) for i in range(100 * len(URLS))
    )
    assert set(URLS) == set(found)
    assert max(found.values()) < 200


@given(some.lists(some.tuples(some.integers(0, 99), all_loads), max_size=60), some.integers(1, 20))
def test_what_is_remembered_is_bounded_and_one_that_is_not_there_is_never_chosen(asked, most):
    places = Homes(max_ahead=2, max_places=most)
    for number, loads in asked:
        wanted = Prefix([b"%d %d" % (number, i) for i in range(9)], b"%d" % number)
        chosen = places.choose(wanted, loads)
        assert loads[chosen] <= min(loads.values()) + 2
        assert len(places) <= most
    assert len(asked) == sum(places.counts.values())


def test_a_conversation_stays_where_load_has_sent_it_and_the_oldest_are_forgotten():
    places = Homes(max_ahead=1, max_places=2)
    wanted = Prefix([b"turn 1"], b"opening")
    idle = dict.fromkeys(URLS, 0)
    first = places.choose(wanted, idle)
    moved = places.choose(wanted, {**idle, first: 2})
    assert moved != first

    assert moved == places.choose(Prefix([b"turn 2", b"turn 1"], b"opening"), idle)
    assert {"first": 1, "kept": 1, "moved": 1} == places.counts
    for number in range(2):
        places.choose(Prefix([b"other %d" % number], b"other"), idle)
    assert first == places.choose(Prefix([b"turn 3", b"turn 2"], b"opening"), idle)


# -- what is the same prefix -----------------------------------------------------------------------


def test_the_opening_of_a_chat_is_the_same_in_all_its_turns_and_another_in_another_chat():
    one = [prefix(messages=turns("one", i)) for i in range(4)]
    assert 1 == len({each.opening for each in one})
    assert one[0].digests[0] in one[1].digests
    # System prompts are what all have in common.
    assert prefix(messages=turns("two", 0)).opening != one[0].opening
    assert prefix(messages=turns("one", 0), model="other").opening != one[0].opening


@pytest.mark.parametrize(
    ("name", "text"), [("prompt", "why? " * 900), ("prompt", [*range(3000)]), ("input", "x" * 5000)]
)
def test_a_text_and_ids_that_go_on_from_others_have_their_opening(name, text):
    whole, beginning = prefix(**{name: text}), prefix(**{name: text[: len(text) // 2]})
    assert whole.opening == beginning.opening
    # All but the last part, which may go on.
    assert set(beginning.digests[1:]) < set(whole.digests)


SHARED = {
    "agents that are told the same first": [SYSTEM, {"role": "user", "content": "Linux."}],
    "ids with one system prompt": [7] * 1024,
    "ids with a system prompt that ends inside a part": [7] * 1000,
    "texts with one system prompt": "You are kind. " * 400,
}


def said(begun: Any, name: str, turn: int) -> dict[str, Any]:
    """A turn of the conversation of that name."""
    words = [f"{name} asks", *(f"{name} {i} " * 30 for i in range(turn * 2))]
    if isinstance(begun, str):
        return {"prompt": begun + "".join(word.ljust(200) for word in words)}
    if isinstance(begun[0], int):
        ids = [i for word in words for i in (*word.encode(), *[1] * 200)]
        return {"prompt": [*begun, *ids]}
    roles = ["user", "assistant"] * len(words)
    return {
        "messages": [
            *begun,
            *({"role": r, "content": w} for r, w in zip(roles, words, strict=False)),
        ]
    }


@pytest.mark.parametrize("kind", SHARED)
def test_conversations_that_open_alike_are_spread_and_each_stays_where_it_is(kind: str):
    places = Homes(max_ahead=0, max_places=9000)
    idle = dict.fromkeys(URLS, 0)
    homes: dict[str, set[URL]] = {}
    for i in range(200):
        for turn in range(4):
            chosen = places.choose(prefix(**said(SHARED[kind], f"{i:05}", turn)), idle)
            homes.setdefault(f"{i:05}", set()).add(chosen)

    assert {1} == {len(each) for each in homes.values()}
    found = Counter(url for each in homes.values() for url in each)
    assert set(URLS) == set(found)
    assert max(found.values()) < 60


@pytest.mark.parametrize("kind", SHARED)
def test_a_conversation_that_load_has_moved_stays_there_though_others_open_alike(kind: str):
    places = Homes(max_ahead=1, max_places=9000)
    idle = dict.fromkeys(URLS, 0)
    for i in range(20):
        places.choose(prefix(**said(SHARED[kind], f"{i:05}", 0)), idle)
    first = places.choose(prefix(**said(SHARED[kind], "moved", 0)), idle)
    moved = places.choose(prefix(**said(SHARED[kind], "moved", 0)), {**idle, first: 2})
    assert first != moved

    for turn in range(5):
        assert moved == places.choose(prefix(**said(SHARED[kind], "moved", turn)), idle)


def test_a_conversation_whose_turns_are_answered_anew_now_and_then_stays():
    places = Homes(max_ahead=0, max_places=9000)
    idle = dict.fromkeys(URLS, 0)
    found = set()
    for i in range(4):
        begun = [*turns("one", 0), {"role": "assistant", "content": f"{i}"}]
        found.add(places.choose(prefix(messages=begun), idle))
    assert 1 == len(found)


def test_several_prompts_in_one_request_have_no_place():
    fields = {"prompt": ["one " * 900, "two " * 900]}
    assert None is prefix_of(fields, chain_of(fields, path="/v1/completions"))


# -- in the pool and the proxy ---------------------------------------------------------------------


def placing(role: Role, number: int = 2) -> Pool:
    rules = PoolRules(
        max_running=99,
        max_queued=9,
        queue_timeout_s=9.0,
        silent_after_s=9.0,
        breaker_failures=1,
        breaker_open_s=1000.0,
        affinity="prefix",
        affinity_max_ahead=8,
        max_places=99,
    )
    pool = Pool(role, rules)
    for url in URLS[:number]:
        pool.add(url)
    return pool


@given(some.sets(some.integers(0, 3), max_size=3), some.sets(some.integers(0, 3), max_size=3))
def test_one_that_drains_or_is_down_is_never_chosen_while_another_is_well(draining, down):
    pool = placing(Role.DECODE, 4)
    wanted = Prefix([b"1"], b"opening")

    async def admitted() -> URL:
        instance = await pool.admit(tokens=1, prefix=wanted)
        pool.leave(instance, tokens=1)
        return instance.url

    asyncio.run(admitted())  # it has a place then
    for i in draining:
        pool.drain(URLS[i])
    for i in down:
        found = pool.find(URLS[i])
        assert found is not None
        found.failed()
    well = {URLS[i] for i in range(4) if i not in draining | down}
    if well:
        assert asyncio.run(admitted()) in well


async def running_at_home(pool: Pool, *tokens: int) -> list[bool]:
    """Of each prompt of one conversation, none of which ends, whether it went where the first one
    did."""
    wanted = Prefix([b"1"], b"opening")
    found = [await pool.admit(tokens=each, prefix=wanted) for each in tokens]
    return [each is found[0] for each in found]


@pytest.mark.parametrize(
    ("tokens", "stay"),
    [
        ((50_000, 50_000, 50_000), [True, True, False]),
        ((100, 50_000), [True, True]),
        # A short one does not wait for a long one.
        ((50_000, 100), [True, False]),
    ],
)
def test_a_prefill_waits_at_its_place_for_no_more_tokens_than_it_has_itself(tokens, stay):
    assert stay == asyncio.run(running_at_home(placing(Role.PREFILL), *tokens))


@pytest.mark.parametrize("role", [Role.DECODE, Role.WORKER])
def test_where_answers_are_made_long_prompts_count_as_any_other_request(role: Role):
    assert [True] * 9 == asyncio.run(running_at_home(placing(role), *[50_000] * 9))


async def who(fleet: Fleet, **fields: object) -> str:
    async with await fleet.post(CHAT, model="m", **fields) as response:
        assert 200 == response.status
        return str((await response.json())["from"])


async def test_a_conversation_stays_at_its_instances_and_goes_elsewhere_when_they_are_gone(
    fleet: Fleet,
):
    await fleet.start(3, 3, affinity="prefix")
    first = await who(fleet, messages=turns("one", 0))
    for number in range(1, 6):
        assert first == await who(fleet, messages=turns("one", number))
    assert [0, 0, 6] == sorted(len(each.asked) for each in fleet.prefill)
    assert 5 == await fleet.metric('ucm_pd_affinity_total{outcome="kept",role="prefill"}')

    await fleet.kill(next(each for each in fleet.decode if each.name == first))
    second = await who(fleet, messages=turns("one", 6))
    assert first != second
    assert second == await who(fleet, messages=turns("one", 7))


async def test_conversations_with_one_system_prompt_are_spread(fleet: Fleet):
    await fleet.start(1, 3, affinity="prefix")
    found = {await who(fleet, messages=turns(f"number {i}", 0)) for i in range(40)}
    assert 3 == len(found)


async def test_short_prompts_go_where_the_policy_says(fleet: Fleet):
    await fleet.start(1, 2, affinity="prefix", affinity_min_tokens=900)
    found = [await who(fleet, messages=turns("one", 0)) for _ in range(4)]
    assert 2 == len(set(found))
    assert 0 == await fleet.metric('ucm_pd_affinity_total{outcome="first",role="decode"}')


async def test_one_that_is_much_busier_loses_it_to_another(fleet: Fleet):
    await fleet.start(1, 2, affinity="prefix", affinity_max_ahead=2)
    home = await who(fleet, messages=turns("one", 0))
    busy, idle = sorted(fleet.decode, key=lambda each: each.name != home)
    quick, busy.answer = busy.answer, busy.never
    posts = [
        asyncio.create_task(fleet.post(CHAT, model="m", messages=turns("one", i), n=1))
        for i in range(1, 4)
    ]

    async def all_are_there() -> bool:
        return len(busy.asked) == 4

    await until(all_are_there)
    busy.answer = quick

    assert idle.name == await who(fleet, messages=turns("one", 9))
    for post in posts:
        post.cancel()
    await asyncio.gather(*posts, return_exceptions=True)


async def test_workers_that_do_both_have_places_too(fleet: Fleet):
    engines = [await fleet.engine(f"worker{i}") for i in range(3)]
    for engine in engines:
        engine.answer = answering(f'{{"from": "{engine.name}"}}'.encode())
    urls = tuple(each.url.origin() for each in engines)
    await fleet.start(0, 0, affinity="prefix", workers=urls, prefillers=(), decoders=())
    found = {await who(fleet, messages=turns("one", i)) for i in range(6)}
    assert 1 == len(found)
