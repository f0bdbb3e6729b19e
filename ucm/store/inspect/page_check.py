"""Is one file of a backend the whole page that its name says? What a reader checks, and why not.

A file of another version of the format, or one that is sealed by a page key that is not at hand, is
no damaged one: it is told apart.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ucm.errors import TierError
from ucm.store.blocks.blockfile import (
    HEADER_BYTES,
    VERSION,
    BlockId,
    Header,
    Scratch,
    bad_block,
    check_seal,
    decode_header,
    format_version,
    read_sums,
)
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import NO_KEY_ID, PageKey
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix.os_errors import is_gone
from ucm.store.tiers.posix.quarantine import forget_cached

_CHUNK_BYTES: Final = 8 << 20
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
# What open says of links, sockets and devices without a driver.
_NO_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})


class Condition(str, Enum):
    """Of one file."""

    WHOLE = "whole"
    # All sums are right; only who has its page key can tell more.
    SEALED = "sealed_by_another_key"
    OTHER_VERSION = "other_version"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    # Somebody has removed it meanwhile.
    GONE = "gone"


@dataclass(frozen=True)
class ExpectedPage:
    """What a file's place says of it. `version` is the format that its manifest names; None if
    there is no manifest to ask."""

    key: Key
    fingerprint: bytes
    key_id: bytes = b""
    version: int | None = VERSION


@dataclass(frozen=True)
class PageCheck:
    """`why` is empty for a whole page; `header` is None where there is none to be believed."""

    condition: Condition
    why: str = ""
    header: Header | None = None
    status: os.stat_result | None = None


class PageChecker:
    """One thread's: it keeps the memory that pages are read into."""

    def __init__(self, page_key: PageKey | None) -> None:
        self._page_key = page_key
        self._scratch = Scratch()
        self._page = memoryview(b"")

    def check(
        self, name: str, expected: ExpectedPage, *, directory: int | None = None
    ) -> PageCheck:
        """`name` is in the directory that is open as `directory`, or a path. What is read wrong is
        read once more, past this machine's page cache. Never raises for what storage does."""
        try:
            first = self._check(name, expected, directory, 0)
            if first.condition is not Condition.DAMAGED or first.status is None:
                return first
            try:
                return self._check(name, expected, directory, os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return self._check(name, expected, directory, 0)
        except OSError as error:
            if is_gone(error):
                return PageCheck(Condition.GONE)
            return PageCheck(Condition.UNREADABLE, error.strerror or str(error))

    def _check(
        self, name: str, expected: ExpectedPage, directory: int | None, flags: int
    ) -> PageCheck:
        try:
            fd = os.open(name, _FLAGS | flags, dir_fd=directory)
        except OSError as error:
            if error.errno in _NO_FILE:
                return PageCheck(Condition.DAMAGED, "is no plain file")
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return PageCheck(Condition.DAMAGED, "is no plain file")
            checked = self._check_open(fd, status, expected)
            if checked.condition is Condition.DAMAGED:
                forget_cached(fd)
            return checked
        finally:
            os.close(fd)

    def _check_open(self, fd: int, status: os.stat_result, expected: ExpectedPage) -> PageCheck:
        header = None
        try:
            if os.preadv(fd, [self._scratch.header], 0) != HEADER_BYTES:
                return PageCheck(Condition.DAMAGED, "is shorter than a header", None, status)
            version = format_version(self._scratch.header)
            if is_other_version(version, expected):
                return PageCheck(Condition.OTHER_VERSION, f"version {version}", None, status)
            header = decode_header(self._scratch.header)
            block = BlockId(expected.key, expected.fingerprint, header.block.page_bytes)
            why = self._read(fd, status, block, expected.key_id)
        except TierError as error:
            return PageCheck(Condition.DAMAGED, str(error), header, status)
        condition = Condition.SEALED if why else Condition.WHOLE
        return PageCheck(condition, why, header, status)

    def _read(self, fd: int, status: os.stat_result, block: BlockId, key_id: bytes) -> str:
        """Why the seal is not checked; empty if it is, or if there is none. Raises `bad_block`."""
        # Before there is memory for it: a header may say anything.
        if status.st_size != block.file_bytes:
            raise bad_block(f"{status.st_size} bytes long, expected {block.file_bytes}")
        if len(self._page) != padded_bytes(block.page_bytes):
            self._page = memoryview(mmap.mmap(-1, padded_bytes(block.page_bytes)))
        page, wanted = self._page, key_id or NO_KEY_ID
        read_sums(fd, block, page, scratch=self._scratch, chunk_bytes=_CHUNK_BYTES, key_id=wanted)
        if not key_id:
            return ""
        if self._page_key is None or self._page_key.id != key_id:
            return not_at_hand(key_id)
        check_seal(self._scratch.header, page[: block.page_bytes], self._page_key)
        return ""


def not_at_hand(key_id: bytes) -> str:
    """Why a seal is not checked."""
    return f"sealed by the page key {key_id.hex()}, which is not at hand"


def is_other_version(version: int | None, expected: ExpectedPage) -> bool:
    return version not in (None, VERSION) and expected.version in (None, version)
