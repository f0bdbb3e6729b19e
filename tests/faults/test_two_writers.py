"""Two processes that dump the same cold blocks at the same time."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from tests.faults.children import NUM_KEYS
from tests.faults.test_killed_writer import TIMEOUT_S, child
from tests.store.tiers.tier_contract import LARGE, content_of, load, make_key, make_page
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus


def test_every_block_is_wholly_the_one_or_the_other_writers(tmp_path: Path) -> None:
    """Also while it is being replaced. (Two honest writers have the same bytes; different ones show
    any mixture.)"""
    whole = {content_of(LARGE, make_page(LARGE, writer)) for writer in range(2)}
    tier = PosixTier([str(tmp_path)])
    seen: list[bytes | ReadStatus] = []
    start_s = str(time.time() + 1.0)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(child("dump_keys", str(tmp_path), str(writer), start_s))
            for writer in range(2)
        ]
        deadline_s = time.monotonic() + TIMEOUT_S
        while any(writer.poll() is None for writer in writers):
            assert time.monotonic() < deadline_s
            seen.extend(load(tier, LARGE, make_key(i)) for i in range(NUM_KEYS))
        assert [writer.returncode for writer in writers] == [0, 0]

    assert set(seen) <= whole | {ReadStatus.ABSENT}
    assert {load(tier, LARGE, make_key(i)) for i in range(NUM_KEYS)} <= whole
    assert not list(tmp_path.rglob("*.tmp"))
