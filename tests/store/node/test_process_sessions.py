"""What clients leave behind when they die, wait for, or talk nonsense."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.store.node.support import (
    FINGERPRINT,
    PAGE_BYTES,
    Engine,
    Place,
    child,
    engine,
    log_of,
    make_keys,
    wait_until,
)
from ucm.errors import NodeUnavailable
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process
HELD = make_keys("held", 5)
UNFINISHED = make_keys("unfinished", 5)


def held_by_child(client: Engine) -> dict[str, int]:
    return client.status().sessions.get("child/0", {})


def check_nothing_is_held(client: Engine) -> None:
    status = wait_until(
        lambda: (s := client.status()) and "child/0" not in s.sessions and s,
        "the session of the dead is gone",
    )
    assert (status.slots["pins"], status.slots["filling"], status.slots["aside"]) == (0, 0, 0)
    assert status.invariant == ""


def test_a_killed_client_leaves_neither_pins_nor_slots_nor_its_session(place: Place) -> None:
    settings = place.settings()
    with engine(settings) as client:
        client.dump(HELD)
        client.wait_written()
        with child("hold", settings) as other:
            assert held_by_child(client) == {"connections": 1, "filling": 5, "pins": 5}
            other.kill()
            other.wait()

        check_nothing_is_held(client)
        assert client.load(HELD) == (5, 0)
        assert client.load(UNFINISHED) == (0, 0)
        assert place.blocks() == {place.block(key) for key in HELD}


def test_what_ranks_may_still_copy_is_kept_until_the_last_of_them_is_gone(place: Place) -> None:
    settings = place.settings()
    with engine(settings) as client:
        client.dump(HELD)
        client.wait_written()
        with child("copy", settings) as rank:
            with child("hold", settings) as scheduler:
                assert held_by_child(client) == {"connections": 2, "filling": 5, "pins": 5}
                scheduler.kill()
                scheduler.wait()
            wait_until(lambda: held_by_child(client)["connections"] == 1, "it is noticed")

            # Nobody could commit what the rank may still write: it is absent, and out of use.
            assert held_by_child(client) == {"connections": 1, "filling": 0, "pins": 5}
            assert client.status().slots["aside"] == 5
            rank.kill()
            rank.wait()

        check_nothing_is_held(client)


def test_a_lookup_waits_for_the_slot_that_another_session_fills(place: Place) -> None:
    settings, keys = place.settings(), make_keys("a", 4)
    with engine(settings, "writer/0") as writer, engine(settings, "reader/0") as reader:
        offsets = writer.reserve(keys)
        lookup_id = reader.ask(keys)
        wait_until(lambda: writer.status().queues["lookups"] == 1, "the lookup has arrived")
        writer.fill(keys, offsets)
        writer.commit(keys)

        reply = reader.answer(p.LookupReply, lookup_id)

        assert (reply.offsets, reply.from_files, reply.reason) == (offsets, 0, "")


@pytest.mark.parametrize("ending", ["abort", "death"])
def test_a_lookup_ends_before_a_block_that_another_session_gave_up(
    place: Place, ending: str
) -> None:
    settings, keys = place.settings(), make_keys("a", 4)
    with engine(settings, "reader/0") as reader:
        writer = engine(settings, "writer/0")
        offsets = writer.reserve(keys)
        writer.fill(keys[:2], offsets[:2])
        writer.commit(keys[:2])
        lookup_id = reader.ask(keys)
        wait_until(lambda: reader.status().queues["lookups"] == 1, "the lookup has arrived")
        if ending == "abort":
            writer.client.send(p.Abort(ns=1, keys=list(keys[2:])))
        else:
            writer.close()

        reply = reader.answer(p.LookupReply, lookup_id)

        assert (reply.offsets, reply.reason) == (offsets[:2], "never_stored")
        writer.close()


def test_two_engines_that_dump_one_prompt_write_it_once(place: Place) -> None:
    settings, keys = place.settings(), make_keys("a", 4)
    with engine(settings, "one/0") as one, engine(settings, "two/0") as two:
        offsets = one.reserve(keys)

        assert two.reserve(keys) == [p.HAVE] * 4

        one.fill(keys, offsets)
        one.commit(keys)
        assert one.wait_written().counters["write_done"] == 4


def hello(version: int = p.VERSION) -> bytes:
    return p.encode(p.Hello(version=version, session="odd/0", role="scheduler", pid=1))


def namespace(page_bytes: int = PAGE_BYTES, block_tokens: int = 128) -> p.OpenNamespace:
    return p.OpenNamespace(
        ns=1,
        fingerprint=FINGERPRINT,
        page_bytes=page_bytes,
        block_tokens=block_tokens,
        manifest=b"{}",
    )


def opened(message: p.ClientMessage) -> bytes:
    return hello() + p.encode(namespace()) + p.encode(message)


def lookup(keys: list[bytes], *, ns: int = 1, read_from: int = 0) -> p.Lookup:
    return p.Lookup(id=1, ns=ns, keys=keys, read_from=read_from, load=True, timeout_ms=100)


KEY = bytes(HELD[0])
NONSENSE: dict[str, Callable[[], bytes]] = {
    "of another protocol": lambda: b"GET / HTTP/1.1\r\n\r\n",
    "that is too long": lambda: struct.pack("<I", p.MAX_FRAME_BYTES + 1),
    "that is not msgpack": lambda: struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    "that only node caches send": lambda: p.encode(p.RanksReady(count=1)),
    "before Hello": lambda: p.encode(p.GetStatus(id=1)),
    "of another version": lambda: hello(p.VERSION + 1),
    "said Hello twice": lambda: hello() + hello(),
    "for a namespace that it has not opened": lambda: hello() + p.encode(lookup([KEY])),
    "with fewer parents than keys": lambda: opened(p.Commit(ns=1, keys=[KEY, KEY], parents=[b""])),
    "about pages without bytes": lambda: hello() + p.encode(namespace(page_bytes=0)),
    "about pages of fewer bytes than none": lambda: hello() + p.encode(namespace(-4096)),
    "with fewer keys than it has read": lambda: opened(lookup([KEY], read_from=2)),
    "with a head of fewer than no keys": lambda: opened(lookup([KEY], read_from=-1)),
    "with a key that is none": lambda: opened(lookup([KEY[:31]])),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_client_is_dropped_for_a_message(place: Place, nonsense: Callable[[], bytes]) -> None:
    settings = place.settings()
    with engine(settings) as client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as odd:
        odd.settimeout(20.0)
        odd.connect(settings.socket_path)
        odd.sendall(nonsense())

        assert drained(odd)
        odd.close()
        check_it_still_serves(client)
    log = log_of(settings)
    assert log.count("dropped a client: ") == 1
    assert "Traceback" not in log


def drained(sock: socket.socket) -> bool:
    """Reads until the other end has closed."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def check_it_still_serves(client: Engine) -> None:
    client.dump(HELD)
    assert client.load(HELD) == (5, 0)
    status = client.wait_written()
    # What was dropped has gone when its own end has closed.
    wait_until(lambda: set(client.status().sessions) == {"engine/0"}, "it has gone")
    assert status.invariant == ""


def test_it_goes_on_accepting_after_it_ran_out_of_descriptors(place: Place) -> None:
    settings = place.settings()
    with engine(settings) as client, ExitStack() as stack:
        num_open = len(os.listdir(f"/proc/{client.pid}/fd"))
        resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (num_open + 8, num_open + 8))
        for _ in range(20):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(settings.socket_path)
        time.sleep(0.3)
        assert client.status().invariant == ""
        stack.close()

        with engine(settings, "next/0") as another:
            assert another.pid == client.pid


def test_a_second_scheduler_side_of_one_session_is_dropped(place: Place) -> None:
    settings = place.settings()
    with engine(settings) as client, Engine(settings) as second:
        with pytest.raises(NodeUnavailable, match="lost the node cache"):
            second.status()
        check_it_still_serves(client)
