"""Tools on a bucket of a server that people run: more than one answer to a listing, writers beside
them, and objects that are not UCM's."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import A, B, BucketStore, bucket_settings
from tests.cli.parts import ucm
from tests.cluster.broken_lists import BrokenLists
from tests.cluster.seaweedfs import SeaweedServer
from tests.cluster.test_s3_nodes import BLOCKS, node, prompt
from tests.cluster.test_s3_nodes import place as place
from tests.store.node.support import Place
from tests.store.tiers.s3.s3_tiers import PREFIX
from ucm.store.blocks.keys import Key
from ucm.store.inspect.bucket_reclaim import ReclaimedBucket
from ucm.store.inspect.contents import BackendContents
from ucm.store.inspect.examine import Diagnosis
from ucm.store.inspect.verified import Verified

pytestmark = [pytest.mark.long, pytest.mark.cluster]

# More than a server tells in one answer.
OF_A, OF_B = 1_150, 40
OBJECT_BYTES = 24 << 10
GIB = 1 << 30
# How often it is asked for the first parts of all names, until nothing comes, and for all pages.
LISTS_OF_FOLDERS = 3
LISTS_OF_PAGES = 3


def many(name: str, number: int) -> list[Key]:
    return [Key(hashlib.sha256(f"{name} {i}".encode()).digest()) for i in range(number)]


@pytest.fixture
def store(tmp_path: Path, server: SeaweedServer) -> BucketStore:
    """Of two namespaces, with objects of others beside and among the pages."""
    store = BucketStore(server, bucket_settings(tmp_path, server))
    keys = many("a", OF_A)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: store.put(A, keys[i::4]), range(4)))
    store.put(B, many("b", OF_B))
    for name in not_ours(store):
        server.ask("PUT", name, b"of another program")
    return store


def not_ours(store: BucketStore) -> list[str]:
    page = store.name(A, many("a", 1)[0])
    return [
        f"{PREFIX}/notes.txt",
        f"{PREFIX}/quarantine/notes.txt",
        f"{PREFIX}/zzz/{page.rsplit('/', 1)[1]}",
        f"{page}.old",
        f"{page.rsplit('/', 2)[0]}/0000/{page.rsplit('/', 1)[1]}",
        "elsewhere/notes.txt",
    ]


def contents(*args: object, status: int = 0) -> dict[str, tuple[int, int]]:
    """Of each model its pages, and names that nobody looks for."""
    done = ucm(*args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[BackendContents])
    return {each.model: (each.num_pages, each.num_strange) for each in found.namespaces}


def reclaimed(*args: object, status: int = 0) -> ReclaimedBucket:
    done = ucm("reclaim", *args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[ReclaimedBucket])
    return found


def verified(*args: object, status: int = 0) -> Verified:
    done = ucm("verify", *args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    return msgspec.json.decode(done.stdout, type=Verified)


def test_all_pages_are_counted_whatever_one_answer_holds_and_no_object_of_others(
    store: BucketStore,
) -> None:
    assert contents("ls", store.config) == {"a": (OF_A, 2), "b": (OF_B, 0)}
    done = ucm("du", store.config)
    mib = (OF_A + OF_B) * OBJECT_BYTES / (1 << 20)
    assert f"{mib:.1f} MiB in {OF_A + OF_B:,} pages" in done.stdout
    listed = ucm("ls", store.config, "-n", store.name(A, many("a", 1)[0]).split("/")[2])
    assert f"{OF_A:,} pages; the age is" in listed.stdout


def test_what_goes_is_pages_alone_and_as_many_as_were_told(store: BucketStore) -> None:
    # Half a page more than are to stay.
    gb = f"{100.5 * OBJECT_BYTES / GIB:.9f}"
    told = reclaimed(store.config, "--keep-gb", gb, "--dry-run")
    assert (told.stored_pages, told.num_pages) == (OF_A + OF_B, OF_A + OF_B - 100)

    done = reclaimed(store.config, "--keep-gb", gb)
    assert (done.num_pages, done.freed_bytes, done.is_enough) == (
        *(told.num_pages, told.freed_bytes),
        True,
    )
    assert sum(pages for pages, _ in contents("ls", store.config).values()) == 100

    reclaimed(store.config, "--older-than-days", 0)
    left = store.server.names()
    assert {name for name in left if not name.endswith("/manifest.json")} == {*not_ours(store)}
    assert len(left) == len(not_ours(store)) + 2


def test_pages_that_come_meanwhile_are_whole_or_absent(store: BucketStore) -> None:
    """What is written while room is made is young, and what goes is gone as a whole."""
    stop, written = threading.Event(), [0, 0]

    def write(which: int) -> None:
        while not stop.is_set():
            # The second writes what the first did, and what is deleted meanwhile.
            late = many("late", written[0] + 1)[-1]
            store.put(A, [late, *many("a", 3)], may_be_there=True)
            written[which] += 1

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for each in threads:
        each.start()
    try:
        found = [
            reclaimed(store.config, "--keep-gb", f"{n * OBJECT_BYTES / GIB:.9f}")
            for n in (800, 400, 50)
        ]
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert all(each.num_pages > 300 for each in found) and min(written) > 5
    whole = verified(store.config)
    assert whole.num_damaged == whole.num_unreadable == 0
    pages = sum(pages for pages, _ in contents("ls", store.config).values())
    assert whole.num_whole == pages


@pytest.fixture
def way(server: SeaweedServer) -> Iterator[BrokenLists]:
    with BrokenLists(server.port) as way:
        yield way


def test_a_listing_that_breaks_in_the_middle_is_said_and_nothing_is_taken_for_all(
    store: BucketStore, tmp_path: Path, way: BrokenLists
) -> None:
    (tmp_path / "way").mkdir()
    config = bucket_settings(tmp_path / "way", store.server, s3_endpoint=way.url)
    assert contents("ls", config) == {"a": (OF_A, 2), "b": (OF_B, 0)}

    way.break_after(LISTS_OF_FOLDERS + 2)
    done = ucm("ls", config)
    assert way.num_broken and done.returncode == 3 and " pages in 2 namespaces" in done.stdout
    assert "not all of it could be counted" in done.stderr
    assert "can't be listed: the connection broke" in done.stderr

    way.break_after(LISTS_OF_FOLDERS + 1)
    told = reclaimed(config, "--older-than-days", 0, status=3)
    assert "the connection broke" in told.problem and told.num_pages == 0 and way.num_broken
    way.break_after(None)
    assert contents("ls", config) == {"a": (OF_A, 2), "b": (OF_B, 0)}

    way.break_after(LISTS_OF_FOLDERS + 1)
    checked = verified(config, status=3)
    assert checked.num_unreadable >= 1 and way.num_broken
    assert any("the connection broke" in each.why for each in checked.files)


def test_what_has_gone_when_a_listing_breaks_is_what_is_said_and_the_next_run_ends_it(
    store: BucketStore, tmp_path: Path, way: BrokenLists
) -> None:
    (tmp_path / "way").mkdir()
    config = bucket_settings(tmp_path / "way", store.server, s3_endpoint=way.url)
    way.break_after(LISTS_OF_FOLDERS + LISTS_OF_PAGES + 1)
    part = reclaimed(config, "--older-than-days", 0, status=3)
    way.break_after(None)
    assert 0 < part.num_pages < OF_A + OF_B and "the connection broke" in part.problem
    left = sum(pages for pages, _ in contents("ls", config).values())
    assert left == OF_A + OF_B - part.num_pages
    assert reclaimed(config, "--older-than-days", 0).num_pages == left


def test_doctor_finds_it_fit_and_leaves_it_as_it_was(store: BucketStore) -> None:
    before = contents("ls", store.config)
    done = ucm("doctor", store.config, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=Diagnosis).backends
    assert not [each for each in found.findings if each.verdict in ("wrong", "warning")]
    assert contents("ls", store.config) == before
    assert not [name for name in store.server.names() if "ucm-probe" in name]


def test_room_is_made_beside_node_caches_that_write_and_load_the_same_pages(
    place: Place, server: SeaweedServer, tmp_path: Path
) -> None:
    """What goes is computed again; what is loaded is right, which `load` looks at."""
    config = bucket_settings(tmp_path, server, s3_prefix="")
    small = {"cache_capacity_bytes": 1 << 20}
    with node(place, server, "a", **small) as prefill, node(place, server, "b", **small) as decode:
        found = []
        for turn in range(4):
            for i in range(10):
                prefill.dump(prompt(i))
            prefill.wait_written()
            making = threading.Thread(
                target=lambda: found.append(reclaimed(config, "--older-than-days", 0))
            )
            making.start()
            loaded = 0
            while making.is_alive():
                loaded += sum(decode.load(prompt(i))[0] for i in range(10))
            making.join()
            assert loaded or turn
        for each in (prefill, decode):
            status = each.status()
            assert status.invariant == ""
            assert not [name for name in status.counters if "corrupt" in name], status.counters
    assert sum(each.num_pages for each in found) > 10 * BLOCKS
