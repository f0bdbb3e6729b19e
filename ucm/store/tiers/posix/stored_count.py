"""How much is stored in a backend, by account: the whole, namespaces, and salts with a quota.

A small store is counted exactly. Of a larger one some shards are looked at, until `_ENOUGH_FILES`
were seen: keys are digests, so the number of files in a sample is off by its square root, and what
is estimated is taken two such errors higher, for each account by its own files. With 10,000 files
one is 1%; of an account that has 100 of these it is 10%.

What is no page counts as well, and is told apart, for reclaim can't free it: files that are being
written or were left behind, damaged ones in quarantine, and what people have put there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field

from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.grants import NodeAccount
from ucm.store.tiers.posix.os_errors import READ_ONLY_ERRNOS
from ucm.store.tiers.posix.plain_files import DIRECTORY_FLAGS
from ucm.store.tiers.posix.reclaim_plan import WHOLE
from ucm.store.tiers.posix.shard_walk import ShardWalk, close_all, real_bytes

_ENOUGH_FILES = 10_000
_ERRORS_ABOVE = 2.0
# So many nodes that have fallen silent are known again.
_MAX_SILENT = 10_000

Nodes = Mapping[str, Mapping[str, NodeAccount]]


@dataclass(frozen=True)
class StoredCount:
    """`nbytes` by account: rather too much than too little; `other_bytes` are those of them that
    are no pages'. `error` is one standard error of the whole, as a share; 0 for what was counted
    whole."""

    nbytes: Mapping[str, int]
    error: float
    num_files: int
    other_bytes: Mapping[str, int] = field(default_factory=dict)


def count_stored(
    root: int,
    now_ns: Callable[[], int],
    tick: Callable[[], None],
    *,
    salts: Collection[str] = (),
    enough: int = _ENOUGH_FILES,
) -> StoredCount:
    """`tick` is called after each shard; `salts` are accounts. Raises OSError."""
    nbytes: Counter[str] = Counter()
    files: Counter[str] = Counter()
    others: Counter[str] = Counter()
    large: Counter[str] = Counter()
    part = 0.0
    with closing(ShardWalk(root, now_ns, _refuse, salts).shards()) as walk:
        for leaves, share in walk:
            close_all(leaf.fd for leaf in leaves)
            for leaf in leaves:
                for name in leaf.accounts:
                    others[name] += leaf.other_bytes
                    large[name] += leaf.large_bytes
                others.update(leaf.salt_bytes)
                for file in leaf.files:
                    files.update(file.accounts)
                    for name in file.accounts:
                        nbytes[name] += file.nbytes
            part += share
            if files[WHOLE] >= enough:
                break
            tick()
        else:
            part = 1.0

    def error(name: str) -> float:
        return float((max(0.0, 1 - part) / max(1, files[name])) ** 0.5)

    large[WHOLE] += _quarantine_bytes(root, now_ns())
    other_bytes = {
        name: large[name] + int(others[name] / part) for name in large.keys() | others.keys()
    }
    estimated = Counter(other_bytes)
    for name, seen in nbytes.items():
        estimated[name] += int(seen / part * (1 + _ERRORS_ABOVE * error(name)))
    return StoredCount(estimated, error(WHOLE), int(files[WHOLE] / part), other_bytes)


def _refuse(name: str, error: OSError) -> None:
    """What can't be counted may be anything; what this user may not look at is left out."""
    if error.errno not in READ_ONLY_ERRNOS:
        raise OSError(error.errno, error.strerror, name) from error


def _quarantine_bytes(root: int, now_ns: int) -> int:
    """They are few, and belong to the store."""
    total = 0
    try:
        top = os.open(paths.QUARANTINE, DIRECTORY_FLAGS, dir_fd=root)
    except OSError:
        return 0
    try:
        for _, _, files, fd in os.fwalk(dir_fd=top, follow_symlinks=False):
            for name in files:
                with suppress(OSError):
                    total += real_bytes(os.stat(name, dir_fd=fd, follow_symlinks=False), now_ns)
    finally:
        os.close(top)
    return total


@dataclass
class UsedBook:
    """What is used of each account: what was counted, what nodes have written since they were
    counted, less what was deleted. For one thread."""

    _counted: Counter[str] = field(default_factory=Counter)
    # Of that, what is no page.
    _others: Mapping[str, int] = field(default_factory=dict)
    # What nodes may have written that are gone, beside what they have said.
    _unsure: Counter[str] = field(default_factory=Counter)
    # Of each node and account, what it had written then, and had been found; of one that is silent,
    # what it had said last.
    _marks: dict[str, dict[str, int]] = field(default_factory=dict)
    _nodes: dict[str, Mapping[str, NodeAccount]] = field(default_factory=dict)

    def counted(self, count: StoredCount, before: Nodes) -> None:
        """`before`: the nodes as they were when the count began, so that what was written
        meanwhile, or is being written, is rather counted twice than missed."""
        self._counted, self._unsure = Counter(count.nbytes), Counter()
        self._others = count.other_bytes
        silent = [each for each in self._marks.items() if each[0] not in before]
        self._marks = dict(silent[-_MAX_SILENT:])
        for node, accounts in before.items():
            self._marks[node] = {
                name: account.written_bytes - account.in_flight_bytes
                for name, account in accounts.items()
            }

    def heard(self, nodes: Nodes) -> None:
        """All nodes that live. Who is missing may have written all that it was granted; if it
        comes back, what it had said before is not counted again."""
        for node in self._nodes.keys() - nodes.keys():
            said = self._nodes.pop(node)
            for name, account in said.items():
                self._counted[name] += account.written_bytes - self._mark(node, name)
                self._unsure[name] += max(0, (account.up_to_bytes or 0) - account.written_bytes)
            self._marks[node] = {name: account.written_bytes for name, account in said.items()}
        self._nodes.update(nodes)

    def deleted(self, nbytes: Mapping[str, int]) -> None:
        """By account. Below 0 where what was written since is deleted: `used_bytes` has both."""
        self._counted.subtract(nbytes)

    @property
    def is_unsure(self) -> bool:
        """The store should be counted anew."""
        return any(self._unsure.values())

    def most_bytes(self, name: str) -> int:
        """What may be used of an account: nothing is granted of it. Nothing is deleted for it."""
        return self.used_bytes(name) + self._unsure[name]

    def used_bytes(self, name: str) -> int:
        since = sum(
            accounts[name].written_bytes - self._mark(node, name)
            for node, accounts in self._nodes.items()
            if name in accounts
        )
        return max(0, self._counted[name] + since)

    def other_bytes(self, name: str) -> int:
        """Of an account, what reclaim can't free, as it was when it was counted."""
        return self._others.get(name, 0)

    def names(self) -> set[str]:
        return {*self._counted, *(name for each in self._nodes.values() for name in each)}

    def _mark(self, node: str, name: str) -> int:
        return self._marks.get(node, {}).get(name, 0)
