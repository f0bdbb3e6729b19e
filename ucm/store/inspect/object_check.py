"""Is one object of a bucket the whole page that its name says? As `page_check.py` does of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.errors import TierError
from ucm.store.blocks.block_bytes import check_head, check_sums
from ucm.store.blocks.blockfile import (
    HEADER_BYTES,
    BlockId,
    Header,
    bad_block,
    check_seal,
    decode_header,
    format_version,
)
from ucm.store.blocks.page_key import NO_KEY_ID, PageKey
from ucm.store.inspect.page_check import (
    Condition,
    ExpectedPage,
    PageCheck,
    is_other_version,
    not_at_hand,
)

if TYPE_CHECKING:
    from ucm.store.tiers.s3.bucket import Got
    from ucm.store.tiers.s3.listed_bucket import ListedBucket

# Of what is longer the header is read first: an object may have any length.
_TRUSTED_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class ObjectCheck:
    """`tag` tells the content that was checked from others; None: none came."""

    of_page: PageCheck
    tag: str | None = None


@dataclass(frozen=True)
class ObjectChecker:
    """Any thread."""

    objects: ListedBucket
    page_key: PageKey | None

    def check(self, name: str, size_bytes: int, expected: ExpectedPage) -> ObjectCheck:
        """Of an object that was so long when it was listed. What is read wrong is read once more.
        Never raises for what storage does."""
        first = self._read(name, size_bytes, expected)
        if first.of_page.condition is not Condition.DAMAGED:
            return first
        return self._read(name, size_bytes, expected)

    def _read(self, name: str, size_bytes: int, expected: ExpectedPage) -> ObjectCheck:
        try:
            got = self.objects.get_head(name, HEADER_BYTES) if size_bytes > _TRUSTED_BYTES else None
            if got is None or _is_as_long_as_it_says(got):
                most_bytes = max(size_bytes, _TRUSTED_BYTES)
                got = self.objects.get(name, most_bytes=most_bytes)
        except TierError as error:
            return ObjectCheck(PageCheck(Condition.UNREADABLE, str(error)))
        if got is None:
            return ObjectCheck(PageCheck(Condition.GONE))
        return ObjectCheck(self._check(got, expected), got.tag)

    def _check(self, got: Got, expected: ExpectedPage) -> PageCheck:
        head, header = got.content[:HEADER_BYTES], None
        try:
            if len(head) < HEADER_BYTES:
                return PageCheck(Condition.DAMAGED, "is shorter than a header")
            version = format_version(head)
            if is_other_version(version, expected):
                return PageCheck(Condition.OTHER_VERSION, f"version {version}")
            header = decode_header(head)
            why = self._sums(got, header, expected)
        except TierError as error:
            return PageCheck(Condition.DAMAGED, str(error), header)
        return PageCheck(Condition.SEALED if why else Condition.WHOLE, why, header)

    def _sums(self, got: Got, header: Header, expected: ExpectedPage) -> str:
        """Why the seal is not checked; empty if it is, or if there is none. Raises `bad_block`."""
        block = BlockId(expected.key, expected.fingerprint, header.block.page_bytes)
        key_id = expected.key_id
        check_head(got.content, got.size_bytes, block, key_id=key_id or NO_KEY_ID)
        if len(got.content) != got.size_bytes:
            raise bad_block(f"only {len(got.content)} bytes of {got.size_bytes} came")
        page = got.content[HEADER_BYTES:]
        check_sums(header, page)
        if not key_id:
            return ""
        if self.page_key is None or self.page_key.id != key_id:
            return not_at_hand(key_id)
        check_seal(got.content[:HEADER_BYTES], page[: block.page_bytes], self.page_key)
        return ""


def _is_as_long_as_it_says(head: Got) -> bool:
    try:
        return decode_header(head.content).block.file_bytes == head.size_bytes
    except TierError:
        return False
