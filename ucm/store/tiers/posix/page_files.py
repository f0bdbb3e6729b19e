"""Reads and checks the file of a page. What is damaged leaves its place (quarantine.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from ucm.errors import TierError
from ucm.store.blocks.blockfile import BlockId, Scratch, check_header, read_block
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.os_errors import is_gone
from ucm.store.tiers.posix.plain_files import NotPlain, open_plain, open_sized
from ucm.store.tiers.posix.quarantine import Quarantine, forget_cached, move_aside
from ucm.store.tiers.posix.rights import is_own
from ucm.store.tiers.tier import HIT, PageRead, ReadStatus

# Buffered reads stop often to verify what is still in the CPU's cache. Direct ones don't pass
# through it, and want to be few and large.
_BUFFERED_CHUNK_BYTES = 1 << 20
_DIRECT_CHUNK_BYTES = 8 << 20


class PageFiles:
    """Thread-safe. Calls raise OSError for what storage says."""

    def __init__(self, page_key: PageKey | None, quarantine: Quarantine) -> None:
        self._page_key = page_key
        self._quarantine = quarantine
        self._thread = threading.local()

    def scratch(self) -> Scratch:
        try:
            return self._thread.scratch  # type: ignore[no-any-return]
        except AttributeError:
            scratch = self._thread.scratch = Scratch()
            return scratch

    def read(
        self, backend: Backend, path: str, block: BlockId, page: memoryview, flags: int
    ) -> PageRead:
        chunk_bytes = _DIRECT_CHUNK_BYTES if flags else _BUFFERED_CHUNK_BYTES
        try:
            fd, size_bytes = open_sized(path, flags)
        except NotPlain as bad:
            moved = move_aside(os.lstat(path), path, backend, block)
            return PageRead(ReadStatus.CORRUPT, f"{path}: {bad}; {moved}")
        try:
            self._verify(fd, block, page, chunk_bytes, size_bytes)
        except TierError as bad:
            forget_cached(fd)
            return self._read_again(bad, backend, path, block, page)
        finally:
            # Every byte has been verified by then, or none counts.
            with contextlib.suppress(OSError):
                os.close(fd)
        return HIT

    def _verify(
        self, fd: int, block: BlockId, page: memoryview, chunk_bytes: int, size_bytes: int
    ) -> None:
        read_block(
            fd,
            block,
            page,
            scratch=self.scratch(),
            chunk_bytes=chunk_bytes,
            page_key=self._page_key,
            size_bytes=size_bytes,
        )

    def _read_again(
        self, bad: TierError, backend: Backend, path: str, block: BlockId, page: memoryview
    ) -> PageRead:
        """Past the page cache as far as the filesystem lets us: is it the file that is damaged, or
        what this machine has read of it?"""
        try:
            fd, size_bytes = open_sized(path, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd, size_bytes = open_sized(path)
        try:
            self._verify(fd, block, page, _DIRECT_CHUNK_BYTES, size_bytes)
        except TierError as again:
            done = self._quarantine.move(os.fstat(fd), path, backend, block)
            return PageRead(ReadStatus.CORRUPT, f"{path}: {again}; {done}")
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        return PageRead(ReadStatus.HIT, f"{path}: {bad}; right when it was read once more")

    def is_whole(self, path: str, backend: Backend, block: BlockId) -> bool:
        """By its size and header. What isn't counts as not there, and is replaced."""
        try:
            fd = open_plain(path)
            try:
                check_header(fd, block, scratch=self.scratch(), page_key=self._page_key)
            finally:
                with contextlib.suppress(OSError):
                    os.close(fd)
        except NotPlain:
            # A directory can't be replaced by a file.
            move_aside(os.lstat(path), path, backend, block)
            return False
        except TierError:
            return False
        except OSError as error:
            # One of this user's own that it may not read can as well be replaced.
            if is_gone(error) or (error.errno == errno.EACCES and is_own(path)):
                return False
            raise
        return True
