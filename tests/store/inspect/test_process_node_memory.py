"""What a node cache has in memory, asked from outside."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.parts import PAGE_BYTES, Store, manifest
from tests.store.node.support import Place, engine, make_keys
from ucm.store.blocks.namespace import fingerprint, to_json
from ucm.store.inspect.node_memory import keys_in_memory
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process

MINE = manifest("a")


def test_keys_in_memory_are_told_from_others_and_nothing_is_made(place: Place) -> None:
    Store(place.store).put(MINE, keys := make_keys("a", 3))
    with engine(place.settings()) as client:
        opening = p.OpenNamespace(
            ns=7,
            fingerprint=fingerprint(MINE),
            page_bytes=PAGE_BYTES,
            block_tokens=MINE.block_tokens,
            manifest=to_json(MINE),
        )
        client.client.send(opening)
        client.client.send(
            p.Lookup(id=1, ns=7, keys=list(keys[:2]), read_from=0, load=True, timeout_ms=5000)
        )
        client.answer(p.LookupReply)

        assert keys_in_memory(place.settings(), MINE, keys, page_bytes=PAGE_BYTES) == set(keys[:2])
        other = manifest("b")
        assert keys_in_memory(place.settings(), other, keys, page_bytes=PAGE_BYTES) == frozenset()
        assert not (place.store / fingerprint(other).hex()).exists()


def test_without_a_node_cache_nothing_is_in_memory(place: Place) -> None:
    Store(place.store).put(MINE, keys := make_keys("a", 3))
    shutil.rmtree(place.directory / "sockets", ignore_errors=True)

    assert keys_in_memory(place.settings(), MINE, keys, page_bytes=PAGE_BYTES) == frozenset()
    assert not (place.directory / "sockets").exists()
