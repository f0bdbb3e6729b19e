"""What requests ask of the tier: how much at once, for how long, and what becomes of answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tests.integration.tiering.rows import make_keys
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import TaskFailed
from ucm.integration.tiering.counts import Series, TierCounts
from ucm.integration.tiering.lookups import RowLookups
from ucm.integration.tiering.promises import RowsPromised, WaitedGroup
from ucm.outcome import Outcome
from ucm.store.api.tasks import Task
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

GROUP = WaitedGroup(number=0, chunk_tokens=4, keeps_all=True)
KEYS = make_keys("asked", 8)


class Store:
    """Answers when the test says so: `here` are there."""

    def __init__(self) -> None:
        self.is_ready = True
        self.here: set[Key] = set()
        self.finds: list[tuple[list[Key], Task]] = []
        self.waits: list[tuple[list[Key], Task]] = []
        self.withdrawn: list[Task] = []

    def find(self, keys: Sequence[Key]) -> Task:
        self.finds.append((list(keys), Task(10.0)))
        return self.finds[-1][1]

    def wait_for(self, keys: Sequence[Key], wait_s: float) -> Task:
        self.waits.append((list(keys), Task(wait_s)))
        return self.waits[-1][1]

    def withdraw(self, question: Task) -> None:
        self.withdrawn.append(question)

    def answer(self) -> None:
        for keys, task in self.finds:
            if not task.has_ended:
                places = bytes(p.IN_MEMORY if key in self.here else 0 for key in keys)
                task.finish(p.Found(id=1, places=places, reason=Outcome.FINE))


class Asking:
    def __init__(self, **settings: Any) -> None:
        self.store: Any = Store()
        self.counts = TierCounts()
        store = StoreSettings(socket_path="", max_keys=settings.pop("max_keys", 65_536))
        self.lookups = RowLookups(self.store, GROUP, Settings(store=store, **settings), self.counts)

    def ask(self, name: str, keys: Sequence[Key] = KEYS) -> list[bool | None]:
        look = self.lookups.lookup
        found = [look(name, key, group=0, end=(i + 1) * 4) for i, key in enumerate(keys)]
        self.lookups.flush()
        return found

    def promises(self) -> dict[str, float]:
        numbers, _ = self.counts.take()
        return {
            series.values[0]: number
            for series, number in numbers.items()
            if series.name == "ucm_tiering_promises"
        }


def test_all_rows_of_a_request_are_one_question_whose_answers_hold() -> None:
    asking = Asking()
    asking.store.here = set(KEYS[:5])
    assert asking.ask("one") == [None] * 8
    assert asking.ask("one") == [None] * 8
    assert [keys for keys, _ in asking.store.finds] == [KEYS]
    asking.store.answer()

    assert asking.ask("one") == [True] * 5 + [False] * 3
    asking.store.here = set()
    assert asking.ask("one") == [True] * 5 + [False] * 3
    assert len(asking.store.finds) == 1
    found = asking.counts.take()[0]
    assert found[Series("ucm_tiering_asked_rows", ("found",))] == 5
    assert found[Series("ucm_tiering_asked_rows", ("absent",))] == 3


def test_a_row_that_could_not_be_loaded_is_absent_from_then_on() -> None:
    asking = Asking()
    asking.store.here = set(KEYS)
    asking.ask("one")
    asking.store.answer()
    assert asking.ask("one") == [True] * 8
    asking.lookups.lost("one", KEYS[3:4])

    assert asking.ask("one") == [True] * 3 + [False] + [True] * 4


def test_no_more_questions_are_under_way_than_the_settings_say_and_each_gets_its_turn() -> None:
    asking = Asking(max_lookups=2)
    names = [f"request {i}" for i in range(5)]
    for rounds in (2, 4, 5):
        for name in names:
            asking.ask(name)
        assert len(asking.store.finds) == rounds
        asking.store.answer()
    assert all(asking.ask(name) == [False] * 8 for name in names)


def test_who_has_waited_for_a_promise_asks_in_its_turn_as_well() -> None:
    asking = Asking(max_lookups=1)
    asking.ask("without a promise")
    for name in ("one", "two"):
        asking.lookups.begin(name, RowsPromised(5.0))
        asking.ask(name)
    for _, task in asking.store.waits:
        task.finish(Outcome.FINE)
    for number in (1, 2, 3):
        asking.lookups.flush()
        assert len(asking.store.finds) == number
        asking.store.answer()


def test_a_question_has_no_more_keys_than_a_node_cache_takes() -> None:
    keys = make_keys("many", 2500)
    asking = Asking(max_keys=1024)
    asking.store.here = set(keys)
    for _ in range(4):
        asking.ask("one", keys)
        asking.store.answer()

    assert [len(asked) for asked, _ in asking.store.finds] == [1024, 1024, 452]
    assert asking.ask("one", keys) == [True] * 2500


def test_without_an_answer_in_its_time_all_is_absent() -> None:
    asking = Asking(lookup_timeout_ms=1)
    asking.ask("one")
    asking.store.finds[0][1].deadline_s = 0.0
    asking.lookups._requests["one"].until_s = time.monotonic() - 1

    assert asking.ask("one") == [False] * 8
    asking.store.here = set(KEYS)
    asking.store.answer()
    assert asking.ask("one") == [False] * 8, "vLLM has gone by it"
    assert asking.store.withdrawn == [asking.store.finds[0][1]]


def test_a_question_that_fails_finds_nothing() -> None:
    asking = Asking()
    asking.ask("one")
    asking.store.finds[0][1].fail(TaskFailed("the node cache was lost"))

    assert asking.ask("one") == [False] * 8


def test_while_nobody_answers_all_is_absent_at_once() -> None:
    asking = Asking()
    asking.store.is_ready = False

    assert asking.ask("one") == [False] * 8
    assert asking.store.finds == []


def test_what_is_promised_is_waited_for_before_anything_is_asked_for() -> None:
    asking = Asking()
    asking.lookups.begin("one", RowsPromised(5.0))
    assert asking.ask("one") == [None] * 8
    assert [keys for keys, _ in asking.store.waits] == [KEYS]
    assert asking.store.finds == []
    asking.store.waits[0][1].finish(Outcome.FINE)
    asking.store.here = set(KEYS)
    assert asking.ask("one") == [None] * 8
    asking.store.answer()

    assert asking.ask("one") == [True] * 8
    assert asking.promises() == {"kept": 1}
    assert len(asking.store.waits) == 1, "once"


def test_no_more_requests_wait_than_the_settings_say() -> None:
    asking = Asking(max_handoffs=1)
    for name in ("one", "two"):
        asking.lookups.begin(name, RowsPromised(5.0))
        asking.ask(name)

    assert len(asking.store.waits) == 1 and len(asking.store.finds) == 1
    assert asking.promises() == {"crowded": 1}


def test_a_request_that_has_ended_is_forgotten() -> None:
    asking = Asking()
    for i in range(3):
        asking.lookups.begin(f"{i}", RowsPromised(5.0) if i else None)
        asking.ask(f"{i}")
        asking.lookups.end(f"{i}")
    asking.store.answer()
    asking.lookups.flush()

    under_way = [task for _, task in asking.store.finds + asking.store.waits]
    assert len(under_way) == 3 and asking.store.withdrawn == under_way
    assert asking.lookups._requests == {} and asking.lookups._open == {}
