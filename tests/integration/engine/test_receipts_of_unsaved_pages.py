"""A receipt promises what is in storage or on its way there, nothing that storage has refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.errors import Outcome, TierError
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.tiers.tier import Staged, TierNamespace

TOKENS = 6 * BLOCK


class Disk(MemoryTier):
    """Takes nothing while `refuses` says why."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Outcome | None = None

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        if self.refuses is not None:
            raise TierError("the disk takes nothing", reason=self.refuses)
        return super().stage(namespace, key, page, num_tokens=num_tokens)

    @property
    def num_pages(self) -> int:
        return len(self._pages)


def disk_of(engine: Engine) -> Disk:
    disk = engine.link.tier
    assert isinstance(disk, Disk)
    return disk


def promised_tokens(request: SimpleNamespace) -> int:
    receipt = h.parse(request.receipt)
    return receipt.tokens if isinstance(receipt, h.Receipt) else 0


def prefill(engine: Engine, name: str) -> int:
    """Prefills the one prompt. Returns how much of it the receipt promises."""
    return promised_tokens(engine.prefill(name, TOKENS, says=h.Wanted()))


@pytest.fixture
def engine() -> Engine:
    return Engine(Loopback(tier=Disk()))


@pytest.mark.parametrize("reason", ["full", "io_error", "timeout"])
def test_what_storage_has_refused_is_not_promised_and_is_written_when_it_can_be(
    engine: Engine, reason: Outcome
) -> None:
    disk_of(engine).refuses = reason
    prefill(engine, "a")

    assert prefill(engine, "b") == 0
    disk_of(engine).refuses = None
    engine.link.now_s += 60
    prefill(engine, "c")

    assert disk_of(engine).num_pages == 6
    assert prefill(engine, "d") == TOKENS


def test_pages_whose_files_were_removed_are_written_again_for_the_next_receipt(
    engine: Engine,
) -> None:
    assert prefill(engine, "a") == TOKENS
    assert disk_of(engine).num_pages == 6
    disk_of(engine)._pages.clear()
    engine.link.now_s += 60

    assert prefill(engine, "b") == TOKENS
    assert disk_of(engine).num_pages == 6


def test_a_receipt_ends_where_pages_begin_that_storage_refuses(engine: Engine) -> None:
    engine.prefill("a", 2 * BLOCK, says=h.Wanted())
    disk_of(engine).refuses = "full"
    prefill(engine, "b")

    assert prefill(engine, "c") == 2 * BLOCK


def test_what_is_computed_and_dumped_anew_is_promised_again(engine: Engine) -> None:
    """The memory has lost it meanwhile."""
    disk_of(engine).refuses = "full"
    prefill(engine, "a")
    assert prefill(engine, "b") == 0
    disk_of(engine).refuses = None
    engine.link.restart()
    engine.step({})

    assert prefill(engine, "c") == TOKENS
    assert disk_of(engine).num_pages == 6


def test_what_is_dumped_in_doubt_is_not_promised_until_it_is_said_to_be_saved(
    engine: Engine,
) -> None:
    key = Key(bytes(32))
    book = engine.side._promises
    book.on_slot(key, True)
    assert key in book.unsaved

    book.on_saving(p.SavingNews(refused=[], saved=[key], reason=Outcome.FINE))
    assert key not in book.unsaved
    book.on_slot(key, True)
    book.on_slot(key, False)
    assert key not in book.unsaved
