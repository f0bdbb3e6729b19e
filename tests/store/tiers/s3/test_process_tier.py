"""The object tier on a real server: the contract, and what lies in the bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.s3_server import S3Server
from tests.store.tiers.s3.s3_tiers import PREFIX, s3_tier
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    LARGE,
    ODD,
    SMALL,
    TierContract,
    content_of,
    dump,
    load,
    make_key,
    make_page,
)
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.s3.bucket import Bucket, Got
from ucm.store.tiers.s3.tier import S3Tier
from ucm.store.tiers.tier import ReadStatus, Tier

pytestmark = pytest.mark.process
KEY = make_key(1)
PAGE_KEY = PageKey.of(b"a secret of the tests")


class TestS3Tier(TierContract):
    @pytest.fixture
    def tier(self, server: S3Server) -> Tier:
        return s3_tier(server)


class TestS3TierThatSeals(TierContract):
    @pytest.fixture
    def tier(self, server: S3Server) -> Tier:
        return s3_tier(server, page_key=PAGE_KEY)


def name_of(key: Key) -> str:
    digits = key.hex()
    return f"{PREFIX}/{SMALL.fingerprint.hex()}/{digits[:4]}/{digits}.kv"


@pytest.fixture
def tier(server: S3Server) -> S3Tier:
    return s3_tier(server)


# -- what lies in the bucket ---------------------------------------------------------------


def test_an_object_has_the_bytes_of_the_file_that_the_page_would_have(
    server: S3Server, tier: S3Tier, tmp_path: Path
) -> None:
    """One format: what is in files can be copied to a bucket, and back."""
    page = make_page(SMALL, "a")
    for each in (tier, PosixTier([str(tmp_path)])):
        dump(each, SMALL, KEY, page)

    file = Path(paths.block_path(str(tmp_path), SMALL.fingerprint, KEY))
    assert server.ask("GET", name_of(KEY)) == file.read_bytes()
    manifest = server.ask("GET", f"{PREFIX}/{SMALL.fingerprint.hex()}/manifest.json")
    assert manifest == SMALL.manifest_json == tier.read_manifest(SMALL.fingerprint)


def test_a_page_without_an_opened_namespace_still_gets_its_manifest(tier: S3Tier) -> None:
    staged = tier.stage(SMALL, KEY, make_page(SMALL, "a"), num_tokens=BLOCK_TOKENS)

    assert staged is not None
    assert tier.read_manifest(SMALL.fingerprint) == SMALL.manifest_json


def test_a_tail_has_its_tokens_in_its_name(server: S3Server, tier: S3Tier) -> None:
    key = Key(TailKey(KEY, 48))
    dump(tier, SMALL, key, make_page(SMALL, "a"))

    assert server.has(name_of(KEY).replace(".kv", ".48.kv"))


def test_pages_of_another_page_key_are_not_found(server: S3Server, tier: S3Tier) -> None:
    dump(s3_tier(server, page_key=PAGE_KEY), SMALL, KEY, make_page(SMALL, "a"))

    assert load(tier, SMALL, KEY) is ReadStatus.ABSENT


# -- what is damaged -----------------------------------------------------------------------


def truncated(whole: bytes) -> bytes:
    return whole[:-1]


def flipped_in_the_page(whole: bytes) -> bytes:
    return whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]


def flipped_in_the_header(whole: bytes) -> bytes:
    return whole[:100] + bytes([whole[100] ^ 4]) + whole[101:]


def empty(whole: bytes) -> bytes:
    return b""


def foreign(whole: bytes) -> bytes:
    return hashlib.shake_128(b"of another program").digest(len(whole))


@pytest.mark.parametrize(
    "damage", [truncated, flipped_in_the_page, flipped_in_the_header, empty, foreign]
)
def test_a_damaged_object_is_corrupt_once_and_then_absent(
    server: S3Server, tier: S3Tier, damage: Callable[[bytes], bytes]
) -> None:
    """It is kept for people to look at, and its place is free for the next writer."""
    dump(tier, SMALL, KEY, make_page(SMALL, "a"))
    damaged = damage(server.ask("GET", name_of(KEY)))
    server.ask("PUT", name_of(KEY), damaged)

    read = tier.read(SMALL, KEY, make_page(SMALL, "b"))

    assert read.status is ReadStatus.CORRUPT
    assert name_of(KEY) in read.detail
    assert server.ask("GET", read.detail.rpartition("moved to ")[2]) == damaged
    assert load(tier, SMALL, KEY) is ReadStatus.ABSENT
    assert dump(tier, SMALL, KEY, make_page(SMALL, "b"))
    assert load(tier, SMALL, KEY) == content_of(SMALL, make_page(SMALL, "b"))


@pytest.mark.parametrize("damage", [truncated, flipped_in_the_header, empty, foreign])
def test_a_writer_replaces_what_is_no_whole_object(
    server: S3Server, tier: S3Tier, damage: Callable[[bytes], bytes]
) -> None:
    """As far as its size and its header tell; and flush doesn't promise it."""
    dump(tier, SMALL, KEY, make_page(SMALL, "a"))
    server.ask("PUT", name_of(KEY), damage(server.ask("GET", name_of(KEY))))

    assert not tier.holds(SMALL, KEY)
    assert dump(tier, SMALL, KEY, make_page(SMALL, "b"))
    assert tier.holds(SMALL, KEY)


def test_the_object_of_another_page_is_damage(server: S3Server, tier: S3Tier) -> None:
    dump(tier, SMALL, make_key(2), make_page(SMALL, "a"))
    server.ask("PUT", name_of(KEY), server.ask("GET", name_of(make_key(2))))

    assert load(tier, SMALL, KEY) is ReadStatus.CORRUPT


def test_an_object_that_was_forged_among_sealed_ones_is_damage(server: S3Server) -> None:
    """By somebody who may write there, and knows all but the secret."""
    forger = PageKey(PAGE_KEY.id, b"another secret of the tests")
    dump(s3_tier(server, page_key=forger), SMALL, KEY, make_page(SMALL, "forged"))
    tier = s3_tier(server, page_key=PAGE_KEY)

    assert load(tier, SMALL, KEY) is ReadStatus.CORRUPT
    assert load(tier, SMALL, KEY) is ReadStatus.ABSENT


def test_an_object_with_something_in_its_padding_is_damage(server: S3Server, tier: S3Tier) -> None:
    """No checksum is about it, and no page is filled with it."""
    dump(tier, ODD, KEY, make_page(ODD, "a"))
    name = name_of(KEY).replace(SMALL.fingerprint.hex(), ODD.fingerprint.hex())
    whole = server.ask("GET", name)
    server.ask("PUT", name, whole[:-1] + b"x")

    assert load(tier, ODD, KEY) is ReadStatus.CORRUPT


def test_what_came_damaged_once_is_read_again_and_stays_where_it_is(
    server: S3Server, tier: S3Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the network, or this node's memory."""
    dump(tier, SMALL, KEY, make_page(SMALL, "a"))
    get, gets = Bucket.get, 0

    def bad_once(self: Bucket, name: str, *, most_bytes: int) -> Got | None:
        nonlocal gets
        gets += 1
        found = get(self, name, most_bytes=most_bytes)
        assert found is not None
        bad = memoryview(flipped_in_the_page(bytes(found.content)))
        return replace(found, content=bad) if gets == 1 else found

    monkeypatch.setattr(Bucket, "get", bad_once)
    page = make_page(SMALL, "b")
    read = tier.read(SMALL, KEY, page)

    assert read.status is ReadStatus.HIT and "right when it was read once more" in read.detail
    assert content_of(SMALL, page) == content_of(SMALL, make_page(SMALL, "a"))
    assert gets == 2 and server.has(name_of(KEY))


def test_of_what_is_longer_than_a_page_nothing_is_taken_into_memory(
    server: S3Server, tier: S3Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may put there whatever they like."""
    dump(tier, SMALL, KEY, make_page(SMALL, "a"))
    long = server.ask("GET", name_of(KEY)) + bytes(1 << 20)
    server.ask("PUT", name_of(KEY), long)
    taken = []
    get = Bucket.get

    def spied(self: Bucket, name: str, *, most_bytes: int) -> Got | None:
        found = get(self, name, most_bytes=most_bytes)
        taken.append(len(found.content) if found is not None else 0)
        return found

    monkeypatch.setattr(Bucket, "get", spied)
    read = tier.read(SMALL, KEY, make_page(SMALL, "b"))

    assert read.status is ReadStatus.CORRUPT and f"{len(long)} bytes long" in read.detail
    assert taken == [0, 0]
    assert not server.has(name_of(KEY))


def test_no_node_takes_many_objects_away(server: S3Server) -> None:
    """It may be this node that reads badly."""
    tier = s3_tier(server, quarantine_per_minute=1)
    keys = [make_key(i) for i in range(2)]
    for key in keys:
        dump(tier, SMALL, key, make_page(SMALL, "a"))
        server.ask("PUT", name_of(key), b"x")

    assert [load(tier, SMALL, key) for key in keys] == [ReadStatus.CORRUPT] * 2

    assert [server.has(name_of(key)) for key in keys] == [False, True]


def test_two_writers_on_two_nodes_leave_one_whole_page(server: S3Server) -> None:
    """The later one wins, and both know the key from then on."""
    here, there = s3_tier(server), s3_tier(server)
    staged = [
        (each, each.stage(ODD, KEY, make_page(ODD, name), num_tokens=BLOCK_TOKENS))
        for name, each in (("here", here), ("there", there))
    ]
    for each, made in staged:
        assert made is not None
        each.publish(made)

    assert load(here, ODD, KEY) == content_of(ODD, make_page(ODD, "there"))
    assert not dump(here, ODD, KEY, make_page(ODD, "here"))


def test_what_one_node_stores_another_has_at_once(server: S3Server) -> None:
    """Also where it has just missed it."""
    here, there = s3_tier(server), s3_tier(server)
    assert not there.contains_now(LARGE, KEY)

    dump(here, LARGE, KEY, make_page(LARGE, "a"))

    assert there.contains_now(LARGE, KEY)
    assert load(there, LARGE, KEY) == content_of(LARGE, make_page(LARGE, "a"))
