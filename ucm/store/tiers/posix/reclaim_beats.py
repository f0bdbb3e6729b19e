"""What node caches say to each other about one backend, in small files of it: each with every beat
how much it has written, and who holds the lease how much everybody may write.

For the thread of one node. What is decided of it stands in grants.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Mapping

import msgspec

from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.allowance import Allowance
from ucm.store.tiers.posix.filesystem_clock import FilesystemClock
from ucm.store.tiers.posix.grants import GrantsNote, NodeAccount, NodeNote, with_grants
from ucm.store.tiers.posix.os_errors import unless_full
from ucm.store.tiers.posix.reclaim_nodes import Neighbours
from ucm.store.tiers.posix.reclaim_plan import WHOLE, ReclaimRules
from ucm.store.tiers.posix.rights import FileRights
from ucm.store.tiers.posix.small_files import read_small, write_small

# How many beats come in the time of one while somebody writes and waits for grants.
_HURRY = 8


class ReclaimBeats:
    """`node` is the name of this node's file. All that reads or writes one raises OSError, and
    TierError where something else lies there."""

    def __init__(self, allowance: Allowance, rules: ReclaimRules, rights: FileRights) -> None:
        self.node = paths.reclaim_node_name(secrets.token_hex(8))
        # As whoever has the lease said last.
        self.stored_bytes = self.other_bytes = 0
        self._allowance = allowance
        self._rules = rules
        self._rights = rights
        self._neighbours = Neighbours(self.node, rules.stale_s)
        self._clock = FilesystemClock()
        self._beat = 0
        self._said: tuple[dict[str, NodeAccount], list[str]] = {}, []
        self._said_s = self._heard_s = self._obeyed_s = self._published_s = float("-inf")
        self._others: dict[str, Mapping[str, NodeAccount]] = {}
        # By whoever had the lease: nodes may have read of it and not have said so yet.
        self._granted: dict[str, dict[str, int]] = {}
        self._number = 0
        # The accounts that somebody was refused for, and the nodes that were since the last grant.
        self._refused: set[str] = set()
        self._refusing: dict[str, set[str]] = {}
        self._is_hurried = False

    @property
    def gap_s(self) -> float:
        """Until the next beat."""
        return self._rules.heartbeat_s / (_HURRY if self._is_hurried else 1)

    @property
    def problem(self) -> str:
        """Why a node could not be heard, for people; empty if all could."""
        return self._neighbours.problem

    def now_ns(self) -> int:
        """By the filesystem's own clock, once it was asked; never later than it is."""
        return self._clock.now_ns()

    def say(self, root: int) -> None:
        """What this node has written, and that it lives. On a full disk it goes unsaid: what is to
        make room must not need some."""
        self._note_refusals()
        news = self._own_accounts(), sorted(self._refused)
        now_s = time.monotonic()
        # Of those that do not hold the lease; who does goes by what it hears.
        self._is_hurried = news[0] != self._said[0] and self._allowance.is_low()
        if news != self._said or now_s - self._said_s >= self._rules.stale_s / 3:
            self._beat += 1
            note = msgspec.json.encode(NodeNote(self._beat, *news))
            with unless_full():
                self._clock.read(write_small(root, self.node, note, self._rights))
                self._said, self._said_s = news, now_s
        self._allowance.keep_until(self._said_s + self._rules.stale_s / 2)

    def obey(self, root: int) -> None:
        """Takes what the holder of the lease has granted."""
        content = read_small(root, paths.RECLAIM_GRANTS)
        if content is None:
            return
        try:
            note = msgspec.json.decode(content, type=GrantsNote)
        except msgspec.DecodeError:
            return  # of a version to come
        now_s = time.monotonic()
        if note.number < self._number and now_s - self._obeyed_s < self._rules.stale_s:
            return  # an old one: what it grants may be others' by now
        self._number, self._obeyed_s = note.number, now_s
        self.stored_bytes, self.other_bytes = note.used_bytes.get(WHOLE, 0), note.other_bytes
        self._granted = note.up_to_bytes
        self._refused.clear()
        self._refusing = {}
        self._allowance.grant(self._granted.get(self.node, {}))

    def hear(self, root: int) -> dict[str, Mapping[str, NodeAccount]]:
        """The accounts of all nodes that live, this one among them."""
        now_s = time.monotonic()
        if now_s - self._heard_s >= self._rules.heartbeat_s / _HURRY:
            notes, self._heard_s = self._neighbours.alive(root), now_s
            for node, note in notes.items():
                self._are_refused(node, note.refused)
            before = self._others
            self._others = {
                name: with_grants(note.accounts, self._granted.get(name, {}))
                for name, note in notes.items()
            }
            self._is_hurried = any(
                account.written_bytes > before.get(name, {}).get(of, account).written_bytes
                for name, accounts in self._others.items()
                for of, account in accounts.items()
            )
        self._note_refusals()
        return {**self._others, self.node: self._own_accounts()}

    def take_refused(self) -> set[str]:
        """The accounts that somebody was refused for since this was asked last."""
        refused, self._refused = self._refused, set()
        return refused

    def refusing(self, account: str) -> Collection[str]:
        """The nodes that were refused of it since `publish`."""
        return self._refusing.get(account, ())

    def publish(
        self,
        root: int,
        used_bytes: dict[str, int],
        up_to_bytes: dict[str, dict[str, int]],
        *,
        other_bytes: int,
    ) -> None:
        """What is used of each account, and how far each node may go. `other_bytes`: of the whole,
        what is no page."""
        self.stored_bytes, self.other_bytes = used_bytes.get(WHOLE, 0), other_bytes
        self._refusing = {}
        self._granted = up_to_bytes
        self._allowance.grant(up_to_bytes[self.node])
        now_s = time.monotonic()
        # While nobody else waits for it, it is for people.
        is_for_others = up_to_bytes.keys() != {self.node}
        if is_for_others or now_s - self._published_s >= self._rules.heartbeat_s:
            self._published_s = now_s
            self._number += 1
            note = GrantsNote(self._number, used_bytes, up_to_bytes, other_bytes)
            with unless_full():
                encoded = msgspec.json.encode(note)
                write_small(root, paths.RECLAIM_GRANTS, encoded, self._rights)

    def _note_refusals(self) -> None:
        self._are_refused(self.node, self._allowance.take_refusals())

    def _are_refused(self, node: str, names: Iterable[str]) -> None:
        for name in names:
            self._refused.add(name)
            self._refusing.setdefault(name, set()).add(node)

    def _own_accounts(self) -> dict[str, NodeAccount]:
        return {
            name: NodeAccount(each.written_bytes, each.up_to_bytes, each.in_flight_bytes)
            for name, each in self._allowance.allowed().items()
        }
