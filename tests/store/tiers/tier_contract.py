"""What every tier must do. A tier's author subclasses `TierContract`, says how to make the tier,
and inherits the tests. They know nothing of where it keeps its pages.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import pytest

from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.tier import ReadStatus, Tier, TierNamespace

BLOCK_TOKENS = 128


def make_namespace(name: str, *, page_bytes: int) -> TierNamespace:
    manifest_json = f'{{"name": "{name}", "page_bytes": {page_bytes}}}'.encode()
    return TierNamespace(hashlib.sha256(manifest_json).digest(), page_bytes, manifest_json)


def make_key(name: str | int) -> Key:
    return Key(hashlib.sha256(f"key {name}".encode()).digest())


def empty_page(namespace: TierNamespace) -> memoryview:
    """A page buffer as slots are: mapped, hence aligned, and not clean."""
    page = memoryview(mmap.mmap(-1, padded_bytes(namespace.page_bytes)))
    page[:] = b"\xaa" * len(page)
    return page


def make_page(namespace: TierNamespace, seed: str | int) -> memoryview:
    """A page of bytes that are told by `seed`, with junk in its padding."""
    page = empty_page(namespace)
    content = hashlib.shake_128(f"page {seed}".encode()).digest(namespace.page_bytes)
    page[: namespace.page_bytes] = content
    return page


def content_of(namespace: TierNamespace, page: memoryview) -> bytes:
    return bytes(page[: namespace.page_bytes])


def dump(tier: Tier, namespace: TierNamespace, key: Key, page: memoryview) -> bool:
    """Stages and publishes. False if the tier had the key already."""
    tier.open_namespace(namespace)
    staged = tier.stage(namespace, key, page, num_tokens=BLOCK_TOKENS)
    if staged is None:
        return False
    tier.publish(staged)
    return True


def load(tier: Tier, namespace: TierNamespace, key: Key) -> bytes | ReadStatus:
    """The bytes of a hit, or the status that isn't one."""
    page = empty_page(namespace)
    read = tier.read(namespace, key, page)
    return content_of(namespace, page) if read.status is ReadStatus.HIT else read.status


SMALL = make_namespace("small", page_bytes=3 * 4096)
ODD = make_namespace("odd", page_bytes=10_001)
# Two full segments and a short one.
LARGE = make_namespace("large", page_bytes=(2 << 20) + 12_288)
NAMESPACES = pytest.mark.parametrize(
    "namespace", [SMALL, ODD, LARGE], ids=["one_segment", "unaligned", "several_segments"]
)


class TierContract(ABC):
    """Inherit, and name the subclass Test...; every test gets a new and empty tier."""

    @pytest.fixture
    @abstractmethod
    def tier(self) -> Tier:
        """A new, empty tier."""

    @NAMESPACES
    def test_what_was_dumped_is_read_back_bit_for_bit(
        self, tier: Tier, namespace: TierNamespace
    ) -> None:
        """HIT gives exactly the bytes that were staged."""
        tier.open_namespace(namespace)
        page = make_page(namespace, "a")

        assert dump(tier, namespace, make_key(1), page)

        assert load(tier, namespace, make_key(1)) == content_of(namespace, page)

    @NAMESPACES
    def test_padding_is_read_as_zeros(self, tier: Tier, namespace: TierNamespace) -> None:
        """What lay beyond the page in the writer's slot stays there."""
        tier.open_namespace(namespace)
        dump(tier, namespace, make_key(1), make_page(namespace, "a"))
        page = empty_page(namespace)

        assert tier.read(namespace, make_key(1), page).status is ReadStatus.HIT

        assert not any(page[namespace.page_bytes :])

    def test_a_key_that_was_never_dumped_is_absent(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)

        assert load(tier, SMALL, make_key(1)) is ReadStatus.ABSENT
        assert tier.contains(SMALL, [make_key(1)]) == 0

    def test_an_empty_tier_answers_before_any_namespace_was_opened(self, tier: Tier) -> None:
        """Opening writes a manifest; lookups don't depend on it."""
        assert tier.contains(SMALL, [make_key(1)]) == 0
        assert load(tier, SMALL, make_key(1)) is ReadStatus.ABSENT

    def test_contains_counts_leading_keys_only(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        keys = [make_key(i) for i in range(5)]
        for i in (0, 1, 3, 4):
            dump(tier, SMALL, keys[i], make_page(SMALL, i))

        assert tier.contains(SMALL, keys) == 2
        assert tier.contains(SMALL, keys[3:]) == 2
        assert tier.contains(SMALL, keys[2:]) == 0
        assert tier.contains(SMALL, []) == 0

    @pytest.mark.parametrize("now", [False, True])
    def test_leads_to_ends_with_a_page_that_is_there(self, tier: Tier, now: bool) -> None:
        """What it takes to be there before that may be wrong, and not the first page."""
        tier.open_namespace(SMALL)
        keys = [make_key(i) for i in range(5)]
        for i in (0, 1, 3):
            dump(tier, SMALL, keys[i], make_page(SMALL, i))

        assert tier.leads_to(SMALL, keys[:2], now=now) == 2
        assert tier.leads_to(SMALL, keys[:3], now=now) == 2
        assert tier.leads_to(SMALL, keys, now=now) in (2, 4)
        assert tier.leads_to(SMALL, keys[2:], now=now) == 0
        assert tier.leads_to(SMALL, [], now=now) == 0

    def test_a_staged_page_is_invisible_until_it_is_published(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        staged = tier.stage(SMALL, make_key(1), make_page(SMALL, "a"), num_tokens=BLOCK_TOKENS)
        assert staged is not None
        assert tier.contains(SMALL, [make_key(1)]) == 0
        assert load(tier, SMALL, make_key(1)) is ReadStatus.ABSENT

        tier.publish(staged)

        assert tier.contains(SMALL, [make_key(1)]) == 1

    def test_a_discarded_page_never_appears(self, tier: Tier) -> None:
        """Discarding may be repeated, and leaves the key free for the next writer."""
        tier.open_namespace(SMALL)
        staged = tier.stage(SMALL, make_key(1), make_page(SMALL, "a"), num_tokens=BLOCK_TOKENS)
        assert staged is not None

        tier.discard(staged)
        tier.discard(staged)

        assert load(tier, SMALL, make_key(1)) is ReadStatus.ABSENT
        assert dump(tier, SMALL, make_key(1), make_page(SMALL, "b"))

    def test_discarding_after_publishing_keeps_the_page(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        staged = tier.stage(SMALL, make_key(1), make_page(SMALL, "a"), num_tokens=BLOCK_TOKENS)
        assert staged is not None
        tier.publish(staged)

        tier.discard(staged)

        assert load(tier, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))

    def test_a_discarded_page_can_not_be_published(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        staged = tier.stage(SMALL, make_key(1), make_page(SMALL, "a"), num_tokens=BLOCK_TOKENS)
        assert staged is not None
        tier.discard(staged)

        with pytest.raises(TierError):
            tier.publish(staged)

        assert load(tier, SMALL, make_key(1)) is ReadStatus.ABSENT

    def test_staging_a_key_that_is_there_does_nothing(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))

        assert not dump(tier, SMALL, make_key(1), make_page(SMALL, "b"))

        assert load(tier, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))

    def test_two_writers_of_one_key_both_publish_whole_pages(self, tier: Tier) -> None:
        """Staged side by side; the last to publish wins, and nothing is mixed."""
        tier.open_namespace(LARGE)
        staged = [
            tier.stage(LARGE, make_key(1), make_page(LARGE, writer), num_tokens=BLOCK_TOKENS)
            for writer in "ab"
        ]

        for writer, each in zip("ab", staged, strict=True):
            assert each is not None
            tier.publish(each)
            assert load(tier, LARGE, make_key(1)) == content_of(LARGE, make_page(LARGE, writer))

    def test_namespaces_do_not_see_each_other(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        other = make_namespace("other", page_bytes=SMALL.page_bytes)
        tier.open_namespace(other)
        dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))

        assert tier.contains(other, [make_key(1)]) == 0
        assert load(tier, other, make_key(1)) is ReadStatus.ABSENT

    def test_a_page_of_another_size_is_corrupt_once_and_then_absent(self, tier: Tier) -> None:
        """A namespace has one page size; whoever asks with another gets no bytes."""
        tier.open_namespace(SMALL)
        dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))
        larger = replace(SMALL, page_bytes=4 * 4096)

        assert load(tier, larger, make_key(1)) is ReadStatus.CORRUPT
        assert load(tier, larger, make_key(1)) is ReadStatus.ABSENT

    def test_a_namespace_may_be_opened_again(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)
        dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))

        tier.open_namespace(SMALL)

        assert tier.contains(SMALL, [make_key(1)]) == 1

    def test_another_manifest_for_the_same_namespace_is_refused(self, tier: Tier) -> None:
        tier.open_namespace(SMALL)

        with pytest.raises(TierError) as raised:
            tier.open_namespace(replace(SMALL, manifest_json=b"{}"))

        assert raised.value.reason == "corrupt"

    def test_the_writer_keeps_its_page(self, tier: Tier) -> None:
        """The buffer may be reused as soon as `publish` returns, and is not written to."""
        tier.open_namespace(ODD)
        page = make_page(ODD, "a")
        before = bytes(page)
        staged = tier.stage(ODD, make_key(1), page, num_tokens=BLOCK_TOKENS)
        assert staged is not None
        tier.publish(staged)
        assert bytes(page) == before

        page[:] = bytes(len(page))

        assert load(tier, ODD, make_key(1)) == before[: ODD.page_bytes]

    def test_a_page_that_is_not_kept_until_it_is_published_is_never_another(
        self, tier: Tier
    ) -> None:
        """Its writer was too fast with the next page; what is read is the first one or none."""
        tier.open_namespace(ODD)
        page = make_page(ODD, "a")
        before = bytes(page[: ODD.page_bytes])
        staged = tier.stage(ODD, make_key(1), page, num_tokens=BLOCK_TOKENS)
        assert staged is not None

        page[:] = bytes(len(page))
        tier.publish(staged)

        assert load(tier, ODD, make_key(1)) in (before, ReadStatus.CORRUPT)

    def test_threads_that_dump_and_read_one_key_never_see_half_a_page(self, tier: Tier) -> None:
        tier.open_namespace(LARGE)
        whole = {content_of(LARGE, make_page(LARGE, writer)) for writer in range(3)}
        seen: list[bytes | ReadStatus] = []

        def write(writer: int) -> None:
            page = make_page(LARGE, writer)
            for i in range(4):
                dump(tier, LARGE, make_key(i), page)

        def read() -> None:
            seen.extend(load(tier, LARGE, make_key(i % 4)) for i in range(20))

        run_together(*[lambda writer=writer: write(writer) for writer in range(3)], read, read)

        assert set(seen) <= whole | {ReadStatus.ABSENT}
        assert tier.contains(LARGE, [make_key(i) for i in range(4)]) == 4

    def test_closing_may_be_repeated(self, tier: Tier) -> None:
        tier.close()
        tier.close()


def run_together(*calls: Callable[[], None]) -> None:
    """Runs the calls in threads of their own, and raises what any of them raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
