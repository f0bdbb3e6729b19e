"""Goes through the shards of a backend in a random order, and counts what is in them.

A shard is a first and a second byte of keys, in all namespaces at once. Keys are digests, so each
shard is a fair sample of all: of a large store some shards tell how much there is. Only directories
that are there are opened, one below the other, so that none is reached through a link.
"""

from __future__ import annotations

import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from ucm.store.blocks.page_names import is_page_name, is_tail_name, salt_tag_in
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import is_not_there
from ucm.store.tiers.posix.plain_files import DIRECTORY_FLAGS
from ucm.store.tiers.posix.quotas import salt_account
from ucm.store.tiers.posix.reclaim_plan import WHOLE, StoredFile
from ucm.store.tiers.posix.score import bounded_score_ns

_BYTES = 256
# More than a page has.
_LARGE_BYTES = 64 << 20
# What has just been written may not have its blocks yet.
_SETTLED_NS = 60_000_000_000


@dataclass
class Leaf:
    """A directory with pages of one namespace, open as `fd` while the walk is at it. `other_bytes`:
    of files that are no pages, such as those that are being written; `large_bytes`: of those that
    are larger than a page is. Of these nothing says that other directories have such, too.
    `salt_bytes`: of the former, by the account of the salt whose page is to be."""

    namespace: str
    fd: int
    files: list[StoredFile]
    other_bytes: int = 0
    large_bytes: int = 0
    salt_bytes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # That all pages of it have.
        self.accounts = (WHOLE, self.namespace)

    @property
    def nbytes(self) -> int:
        pages_bytes = sum(file.nbytes for file in self.files)
        return self.other_bytes + self.large_bytes + pages_bytes


class ShardWalk:
    """Of the backend open as `root`. Who gets a leaf closes it. What goes meanwhile is left out; so
    is what can't be looked at, unless `trouble`, which is told its name below the backend, raises.
    `salts`: the accounts of salts that pages are told apart by."""

    def __init__(
        self,
        root: int,
        now_ns: Callable[[], int],
        trouble: Callable[[str, OSError], None],
        salts: Collection[str] = (),
    ) -> None:
        self._root = root
        self._salts = salts
        self._now_ns = now_ns
        self._trouble = trouble

    def shards(self) -> Generator[tuple[list[Leaf], float], None, None]:
        """Every shard that has something, in a random order, with the share of all shards that it
        stands for: those that have nothing are passed over. Raises OSError where the backend
        itself can't be listed."""
        namespaces = self._namespaces()
        for first in random.sample(range(_BYTES), _BYTES):
            above = self._open_below(namespaces, f"{first:02x}")
            try:
                there = {name: self._own_names(name, fd) for name, fd in above.items()}
                seconds = sorted(set().union(*there.values()))
                if not seconds:
                    yield [], 1 / _BYTES
                for second in random.sample(seconds, len(seconds)):
                    having = [name for name in above if second in there[name]]
                    found = [
                        self._leaf(name, above[name], f"{first:02x}", second) for name in having
                    ]
                    leaves = [leaf for leaf in found if leaf is not None]
                    yield leaves, 1 / _BYTES / len(seconds)
            finally:
                close_all(above.values())

    def _namespaces(self) -> list[str]:
        with os.scandir(self._root) as entries:
            return [each.name for each in entries if paths.is_own_directory(each.name, level=1)]

    def _open_below(self, namespaces: Iterable[str], name: str) -> dict[str, int]:
        found = {}
        for namespace in namespaces:
            above = self._open(namespace, self._root, namespace)
            if above is None:
                continue
            fd = self._open(name, above, f"{namespace}/{name}")
            os.close(above)
            if fd is not None:
                found[namespace] = fd
        return found

    def _open(self, name: str, above: int, whole_name: str) -> int | None:
        with self._looking_at(whole_name):
            return os.open(name, DIRECTORY_FLAGS, dir_fd=above)
        return None

    def _own_names(self, namespace: str, fd: int) -> set[str]:
        with self._looking_at(namespace), os.scandir(fd) as entries:
            return {each.name for each in entries if paths.is_own_directory(each.name, level=3)}
        return set()

    def _leaf(self, namespace: str, above: int, first: str, second: str) -> Leaf | None:
        whole_name = f"{namespace}/{first}/{second}"
        fd = self._open(second, above, whole_name)
        if fd is None:
            return None
        leaf = Leaf(namespace, fd, [])
        try:
            with self._looking_at(whole_name), os.scandir(fd) as entries:
                for entry in entries:
                    with self._looking_at(f"{whole_name}/{entry.name}"):
                        self._note(leaf, entry, first + second)
        except OSError:
            os.close(fd)
            raise
        return leaf

    def _note(self, leaf: Leaf, entry: os.DirEntry[str], shard: str) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            # What has got its own name this moment may have been listed under neither.
            temp = paths.parse_temp_name(entry.name)
            if temp is not None:
                now_named = os.stat(temp.target, dir_fd=leaf.fd, follow_symlinks=False)
                self._note_other(leaf, entry.name, real_bytes(now_named, self._now_ns()))
            return
        if not stat.S_ISREG(status.st_mode):
            return
        nbytes = real_bytes(status, self._now_ns())
        if not (entry.name.startswith(shard) and is_page_name(entry.name)):
            self._note_other(leaf, entry.name, nbytes)
            return
        leaf.files.append(
            StoredFile(
                entry.name,
                nbytes,
                score_ns=bounded_score_ns(status.st_mtime_ns, status.st_ctime_ns),
                changed_ns=status.st_ctime_ns,
                is_tail=is_tail_name(entry.name),
                accounts=self._accounts(leaf, entry.name),
            )
        )

    def _note_other(self, leaf: Leaf, name: str, nbytes: int) -> None:
        """What is no page, or not yet."""
        if nbytes > _LARGE_BYTES:
            leaf.large_bytes += nbytes
            return
        leaf.other_bytes += nbytes
        temp = paths.parse_temp_name(name)
        if temp is not None and is_page_name(temp.target):
            for account in self._accounts(leaf, temp.target)[len(leaf.accounts) :]:
                leaf.salt_bytes[account] += nbytes

    def _accounts(self, leaf: Leaf, name: str) -> tuple[str, ...]:
        if self._salts:
            salt = salt_account(salt_tag_in(name))
            if salt in self._salts:
                return (*leaf.accounts, salt)
        return leaf.accounts

    def _looking_at(self, name: str) -> _LookingAt:
        return _LookingAt(name, self._trouble)


class _LookingAt:
    """Goes on behind its block where something has gone, or `trouble` takes what is wrong."""

    __slots__ = ("_name", "_trouble")

    def __init__(self, name: str, trouble: Callable[[str, OSError], None]) -> None:
        self._name = name
        self._trouble = trouble

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if not is_not_there(error):
            self._trouble(self._name, error)
        return True


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def real_bytes(status: os.stat_result, now_ns: int) -> int:
    """What a file takes on the disk. What was written just now may have no blocks yet."""
    nbytes = status.st_blocks * 512
    if not nbytes or now_ns - status.st_ctime_ns < _SETTLED_NS:
        return max(nbytes, status.st_size)
    return nbytes
