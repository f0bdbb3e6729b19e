"""What `ucm warm` says of pages that can't be had, of storage that hangs and of a node cache that
goes."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from tests.cli.parts import PAGE_BYTES, Store, flip_bit, keys_of, manifest
from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.conftest import place as place
from tests.store.node.support import Engine, Place, wait_until
from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.blocks.keys import Key
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.node_memory import keys_in_memory
from ucm.store.inspect.warm import warm
from ucm.store.inspect.warm_pages import Warmed

pytestmark = pytest.mark.process

A = manifest("a")
TOKENS = list(range(96))
SMALL_BYTES = 100
PAGES = 6
FEW_KEYS = 1024


def prompts_of(number: int) -> list[AskedPrompt]:
    return [AskedPrompt(A, [each, *TOKENS]) for each in range(number)]


def store_all(path: Path, prompts: list[AskedPrompt]) -> None:
    for prompt in prompts:
        Store(path).put(A, prompt.keys()[:PAGES])


def counts(warmed: Warmed) -> dict[str, int]:
    """Those of pages that are not 0."""
    names = ("in_memory", "read", "missing", "no_room", "damaged", "failed", "timed_out")
    return {name: number for name in names if (number := getattr(warmed, name))}


def long_prompt(num_blocks: int) -> tuple[AskedPrompt, list[Key]]:
    prompt = AskedPrompt(A, list(range(num_blocks * A.block_tokens)))
    return prompt, prompt.keys()


# -- long prompts --------------------------------------------------------------------------------


def test_a_question_that_the_socket_takes_in_pieces_is_answered(place: Place) -> None:
    prompt, keys = long_prompt(20_000)

    warmed = warm(place.settings(), [prompt], [PAGE_BYTES])

    assert counts(warmed) == {"missing": len(keys)}


def test_of_a_long_prompt_a_node_cache_is_asked_what_is_in_memory(place: Place) -> None:
    prompt, keys = long_prompt(16_000)
    Store(place.store).put(A, keys[:2])
    warm(place.settings(), [prompt], [PAGE_BYTES])

    assert keys_in_memory(place.settings(), A, keys, page_bytes=PAGE_BYTES) == set(keys[:2])


def test_a_prompt_of_more_keys_than_a_question_may_have_is_warmed(place: Place) -> None:
    prompt, keys = long_prompt(2 * FEW_KEYS + 10)
    Store(place.store).put(A, keys, page_bytes=SMALL_BYTES)
    settings = place.settings(max_keys=FEW_KEYS)

    warmed = warm(settings, [prompt, *prompts_of(1)], [SMALL_BYTES])

    assert counts(warmed) == {"read": len(keys), "missing": PAGES}
    assert keys_in_memory(settings, A, keys, page_bytes=SMALL_BYTES) == set(keys)


def test_of_a_prompt_in_several_questions_memory_keeps_the_head(place: Place) -> None:
    prompt, keys = long_prompt(2 * FEW_KEYS)
    Store(place.store).put(A, keys, page_bytes=SMALL_BYTES)
    settings = place.settings(max_keys=FEW_KEYS, cache_capacity_bytes=6 << 20)

    warmed = warm(settings, [prompt], [SMALL_BYTES])

    assert warmed.read + warmed.no_room == len(keys)
    assert FEW_KEYS < warmed.read < len(keys)
    in_memory = keys_in_memory(settings, A, keys, page_bytes=SMALL_BYTES)
    # One that was on its way when room ran out may have come behind them.
    assert in_memory >= set(keys[: warmed.read])


# -- why a page was not brought ------------------------------------------------------------------


def test_pages_without_room_in_memory_are_told_from_those_that_are_not_stored(
    place: Place,
) -> None:
    prompt, keys = long_prompt(90)
    Store(place.store).put(A, keys)

    warmed = warm(place.settings(cache_capacity_bytes=1 << 20), [prompt], [PAGE_BYTES])

    assert warmed.read > 0
    assert counts(warmed) == {"read": warmed.read, "no_room": len(keys) - warmed.read}


def test_pages_behind_a_damaged_one_are_not_counted_as_read(place: Place) -> None:
    """Those before it lay in memory, and those behind it were read for nothing."""
    keys = keys_of(A, TOKENS)
    store = Store(place.store)
    store.put(A, keys)
    warm(place.settings(), [AskedPrompt(A, TOKENS[:32])], [PAGE_BYTES])
    flip_bit(store.file(A, keys[2]))

    warmed = warm(place.settings(), [AskedPrompt(A, TOKENS)], [PAGE_BYTES])

    assert counts(warmed) == {"in_memory": 2, "damaged": 4}


@needs_fuse
def test_storage_that_fails_is_told_from_what_is_not_stored(place: Place, tmp_path: Path) -> None:
    prompts = prompts_of(2)
    store_all(place.store, prompts)
    with mount_fuse(place.store, tmp_path / "mnt") as mount:
        settings = place.settings(storage_backends=(str(mount.path),))
        mount.fail("read", errno.EIO)
        warmed = warm(settings, prompts, [PAGE_BYTES])
        for pid in place.pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not place.pids(), "the node cache is gone")

    assert counts(warmed) == {"failed": 2 * PAGES}


def test_two_at_once_have_read_each_page_once(place: Place) -> None:
    prompts = prompts_of(30)
    store_all(place.store, prompts)
    settings = place.settings()
    both: list[Warmed] = []
    with Engine(settings):
        threads = [
            threading.Thread(target=lambda: both.append(warm(settings, prompts, [PAGE_BYTES])))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    total = both[0] + both[1]
    assert counts(total) == {"read": 30 * PAGES, "in_memory": 30 * PAGES}


# -- storage that hangs --------------------------------------------------------------------------


@needs_fuse
@pytest.mark.parametrize("how", ["reads", "all"])
def test_storage_that_hangs_midway_is_given_up_and_told(
    place: Place, tmp_path: Path, how: str
) -> None:
    prompts = prompts_of(12)
    store_all(place.store, prompts)
    with mount_fuse(place.store, tmp_path / "mnt") as mount:
        settings = place.settings(storage_backends=(str(mount.path),), io_timeout_ms=500)

        def hang(done: int, total: int) -> None:
            if done == 3 and how == "reads":
                mount.hang("read")
            elif done == 3:
                mount.freeze()

        warmed = warm(settings, prompts, [PAGE_BYTES], timeout_s=2, on_progress=hang, hold_s=600)
        # Nobody can end it while it waits for the mount.
        mount.kill_server()

    assert warmed.storage_hangs
    assert warmed.read == 3 * PAGES and warmed.timed_out >= PAGES and not warmed.missing
    assert warmed.num_prompts + warmed.unasked_prompts == len(prompts)


# -- a node cache that goes ----------------------------------------------------------------------


class Killer:
    """Kills the node cache after so many prompts, each time up to `times`."""

    def __init__(self, place: Place, after: int, times: int) -> None:
        self._place = place
        self._after = after
        self._left = times

    def __call__(self, done: int, total: int) -> None:
        if done == self._after and self._left:
            self._left -= 1
            kill_node_cache(self._place)


def kill_node_cache(place: Place) -> None:
    for pid in place.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not place.pids(), "the node cache is gone")


def in_memory(settings: StoreSettings, prompts: list[AskedPrompt]) -> int:
    found = (
        keys_in_memory(settings, A, prompt.keys()[:PAGES], page_bytes=PAGE_BYTES)
        for prompt in prompts
    )
    return sum(map(len, found))


def test_after_a_node_cache_that_has_gone_all_is_read_again(place: Place) -> None:
    prompts = prompts_of(5)
    store_all(place.store, prompts)
    lost: list[str] = []

    warmed = warm(
        place.settings(),
        prompts,
        [PAGE_BYTES],
        on_progress=Killer(place, after=3, times=1),
        on_lost=lost.append,
    )

    assert counts(warmed) == {"read": 5 * PAGES} and warmed.num_prompts == 5
    assert in_memory(place.settings(), prompts) == 5 * PAGES
    (told,) = lost
    assert told.startswith("lost the node cache (pid ")
    assert "3 of 5 prompts, of which 18 pages were read" in told


def test_one_that_goes_while_it_is_held_is_filled_again(place: Place) -> None:
    prompts = prompts_of(2)
    store_all(place.store, prompts)
    told: list[Warmed] = []

    def on_warmed(warmed: Warmed) -> None:
        told.append(warmed)
        if len(told) == 1:
            kill_node_cache(place)

    warmed = warm(place.settings(), prompts, [PAGE_BYTES], hold_s=2, on_warmed=on_warmed)

    assert [each.read for each in told] == [2 * PAGES] * 2 and warmed.read == 2 * PAGES
    assert in_memory(place.settings(), prompts) == 2 * PAGES


def test_one_that_goes_again_and_again_ends_it_with_what_was_done(place: Place) -> None:
    prompts = prompts_of(5)
    store_all(place.store, prompts)

    with pytest.raises(NodeUnavailable, match="after 2 of 5 prompts, of which 12 pages were read"):
        warm(place.settings(), prompts, [PAGE_BYTES], on_progress=Killer(place, after=2, times=2))
