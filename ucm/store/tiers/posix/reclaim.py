"""Keeps one backend within its limits: one thread of each node cache, and nobody waits for it.

With each beat it says what this node has written, and tries for the lease. Who holds it counts what
is stored, deletes what is too much, and grants everybody how much to write; the others read what
they are granted. A beat comes sooner where writers need more.

    beat ──► say what was written ──► hold the lease? ──yes──► count ──► delete ──► grant
                                            └──no──► read what is granted

Storage may hang in any call for good: then this thread hangs, and with it go its beats: others take
the lease over, and what this node was granted ends (`Allowance.keep_until`).
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.allowance import Allowance
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.grants import (
    GrantsNote,
    NodeAccount,
    NodeNote,
    granted,
    with_grants,
)
from ucm.store.tiers.posix.lease import ReclaimLease
from ucm.store.tiers.posix.os_errors import unless_full
from ucm.store.tiers.posix.quotas import Limit
from ucm.store.tiers.posix.reclaim_nodes import Neighbours
from ucm.store.tiers.posix.reclaim_plan import WHOLE, ReclaimRules, Want, want_of
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.reclaim_run import ReclaimRun, ReclaimStopped
from ucm.store.tiers.posix.reclaim_says import ReclaimSays
from ucm.store.tiers.posix.small_files import read_small, write_small
from ucm.store.tiers.posix.stored_count import UsedBook, count_stored
from ucm.store.tiers.tier import Chore

_LEAST_GAP_S = 0.05
_MAX_CLOCK_READINGS = 16
# How many beats come in the time of one while somebody writes and waits for grants.
_HURRY = 8
# After a run that could not free what it should, because all is young or storage refuses.
_FRUITLESS_GAP_S = 1.0
# Of the time that it works, how long it rests: while writers can wait for it, and while they can't.
_REST_PER_WORK = 1.0
_PRESSED_SHARE = 0.9
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Reclaimer(Chore):
    """Of one backend. `run` is one thread's; the rest is for any."""

    def __init__(self, backend: Backend, allowance: Allowance, rules: ReclaimRules) -> None:
        self.name = backend.path
        self._backend = backend
        self._allowance = allowance
        self._rules = rules
        self._node = paths.reclaim_node_name(secrets.token_hex(8))
        self._lease = ReclaimLease(rules.stale_s, rules.deletes, backend.rights)
        self._neighbours = Neighbours(self._node, rules.stale_s)
        self._book = UsedBook()
        self._stop = threading.Event()
        self._on_removed: Callable[[list[Key]], None] = lambda keys: None
        self._counts: Counter[str] = Counter()
        # Of the filesystem's clock before this process's, each rather too little.
        self._ahead_ns: deque[int] = deque(maxlen=_MAX_CLOCK_READINGS)
        self._beat = 0
        self._said: tuple[dict[str, NodeAccount], list[str]] = {}, []
        self._said_s = float("-inf")
        self._refused: set[str] = set()
        self._counted_s = self._beaten_s = self._published_s = float("-inf")
        self._heard_s, self._count_took_s = float("-inf"), 0.0
        self._others: dict[str, Mapping[str, NodeAccount]] = {}
        # By whoever had the lease: nodes may have read of it and not have said so yet.
        self._granted: dict[str, dict[str, int]] = {}
        self._number, self._obeyed_s = 0, float("-inf")
        # The nodes that were refused, by account.
        self._refusing: dict[str, set[str]] = {}
        self._is_hurried = False
        self._quiet_until_s = 0.0
        self._says = ReclaimSays(backend.path)
        self._limits: dict[str, Limit | None] = {}
        self._recorder = ReclaimRecorder(backend.rights)

    # -- the thread ------------------------------------------------------------------------

    def run(self, on_removed: Callable[[list[Key]], None]) -> None:
        self._on_removed = on_removed
        while not self._stop.is_set():
            try:
                if self._backend.identity.id is not None:
                    self._at_backend(self._beat_once)
            except ReclaimStopped:
                pass
            except (OSError, TierError) as error:
                self._lease.is_held = False
                self._says.trouble(error)
            self._wait()
        try:
            if self._backend.identity.id is not None:
                self._at_backend(self._leave)
        except (OSError, TierError):
            pass  # what stays behind is taken over, and removed by others

    def stop(self) -> None:
        self._stop.set()
        self._allowance.wake.set()

    def counters(self) -> dict[str, int]:
        whole = self._allowance.quotas.whole
        return {
            **self._counts,
            "stored_limit_bytes": 0 if whole is None else whole.nbytes,
            "reclaim_leases": int(self._lease.is_held),
            "reclaim_refused_writes": self._allowance.num_refused,
        }

    def _wait(self) -> None:
        gap_s = max(_LEAST_GAP_S, self._quiet_until_s - time.monotonic())
        if not self._stop.wait(gap_s):
            beat_s = self._rules.heartbeat_s / (_HURRY if self._is_hurried else 1)
            self._allowance.wake.wait(max(0.0, beat_s - gap_s))
        self._allowance.wake.clear()

    def _at_backend(self, act: Callable[[int], None]) -> None:
        """With a descriptor of the backend that was opened, and of nothing that took its place."""
        with self._backend.identity.pinned() as pinned:
            root = os.open(".", _DIRECTORY, dir_fd=pinned)
        try:
            act(root)
        finally:
            os.close(root)

    def _leave(self, root: int) -> None:
        self._lease.release(root)
        os.unlink(self._node, dir_fd=root)

    # -- a beat ----------------------------------------------------------------------------

    def _beat_once(self, root: int) -> None:
        is_writing = self._own_accounts() != self._said[0]
        self._say(root)
        was_held = self._lease.is_held
        if self._lease.hold(root):
            self._beaten_s = time.monotonic()
            if not was_held:
                self._obey(root)  # what another one has granted last
            self._govern(root)
        else:
            self._counted_s = float("-inf")
            self._refusing = {}
            self._obey(root)
            self._is_hurried = is_writing and self._allowance.is_low()

    def _say(self, root: int) -> None:
        """What this node has written, and that it lives. On a full disk it goes unsaid: what is to
        make room must not need some."""
        self._note_refusals()
        news = self._own_accounts(), sorted(self._refused)
        now_s = time.monotonic()
        if news != self._said or now_s - self._said_s >= self._rules.stale_s / 3:
            self._beat += 1
            note = msgspec.json.encode(NodeNote(self._beat, *news))
            with unless_full():
                mtime_ns = write_small(root, self._node, note, self._backend.rights)
                self._ahead_ns.append(mtime_ns - time.monotonic_ns())
                self._said, self._said_s = news, now_s
        self._allowance.keep_until(self._said_s + self._rules.stale_s / 2)

    def _note_refusals(self) -> None:
        self._are_refused(self._node, self._allowance.take_refusals())

    def _are_refused(self, node: str, names: Iterable[str]) -> None:
        for name in names:
            self._refused.add(name)
            self._refusing.setdefault(name, set()).add(node)

    def _own_accounts(self) -> dict[str, NodeAccount]:
        return {
            name: NodeAccount(each.written_bytes, each.up_to_bytes)
            for name, each in self._allowance.allowed().items()
        }

    def _obey(self, root: int) -> None:
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
        self._counts["stored_bytes"] = note.used_bytes.get(WHOLE, 0)
        self._granted = note.up_to_bytes
        self._refused.clear()
        self._allowance.grant(self._granted.get(self._node, {}))

    def _now_ns(self) -> int:
        """By the filesystem's own clock, once it was asked; never later than it is."""
        ahead_ns = max(self._ahead_ns, default=time.time_ns() - time.monotonic_ns())
        return ahead_ns + time.monotonic_ns()

    # -- with the lease --------------------------------------------------------------------

    def _govern(self, root: int) -> None:
        nodes = self._hear(root)
        since_s = time.monotonic() - self._counted_s
        every_s = 0.0 if self._book.is_unsure else self._rules.check_s
        if since_s >= max(every_s, 20 * self._count_took_s):
            self._count(root, nodes)
        self._grant(root, nodes)
        while self._rules.deletes and time.monotonic() >= self._quiet_until_s:
            if not (wants := self._wants(root)):
                break
            self._reclaim(root, wants)
            self._grant(root, self._hear(root))

    def _hear(self, root: int) -> dict[str, Mapping[str, NodeAccount]]:
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
        nodes = dict(self._others)
        nodes[self._node] = self._own_accounts()
        self._book.heard(nodes)
        return nodes

    def _count(self, root: int, nodes: Mapping[str, Mapping[str, NodeAccount]]) -> None:
        started_s = time.monotonic()
        count = count_stored(
            root,
            self._now_ns,
            lambda: self._keep(root),
            salts=self._allowance.quotas.by_salt,
        )
        self._book.counted(count, nodes)
        self._counted_s = time.monotonic()
        self._count_took_s = self._counted_s - started_s

    def _keep(self, root: int) -> None:
        """Between two steps of something long: goes on beating. Raises ReclaimStopped."""
        if self._stop.is_set():
            raise ReclaimStopped
        if time.monotonic() - self._beaten_s >= self._rules.heartbeat_s:
            self._say(root)
            if not self._lease.hold(root):
                raise ReclaimStopped
            self._beaten_s = time.monotonic()

    def _limit(self, root: int, name: str) -> Limit | None:
        quotas = self._allowance.quotas
        if name == WHOLE:
            return quotas.whole
        if name in quotas.by_salt:
            return quotas.by_salt[name]
        if name not in self._limits:
            manifest = read_small(root, f"{name}/{paths.MANIFEST}")
            if manifest is None:
                return quotas.of(name, b"")
            self._limits[name] = quotas.of(name, manifest)
        return self._limits[name]

    def _grant(self, root: int, nodes: Mapping[str, Mapping[str, NodeAccount]]) -> None:
        up_to: dict[str, dict[str, int]] = {node: {} for node in nodes}
        used: dict[str, int] = {}
        for name in {WHOLE, *self._book.names()}:
            limit = self._limit(root, name)
            if limit is None:
                continue
            used[name] = self._book.used_bytes(name)
            shares = granted(
                limit_bytes=limit.nbytes,
                used_bytes=self._book.most_bytes(name),
                nodes={node: each[name] for node, each in nodes.items() if name in each},
                spare_share=self._rules.spare_share,
                refused=self._refusing.get(name, ()),
            )
            for node, nbytes in shares.items():
                up_to[node][name] = nbytes
        self._counts["stored_bytes"] = self._book.used_bytes(WHOLE)
        self._refusing = {}
        self._granted = up_to
        self._allowance.grant(up_to[self._node])
        self._number += 1
        note = GrantsNote(self._number, used, up_to)
        now_s = time.monotonic()
        # While nobody else waits for it, it is for people.
        if up_to.keys() != {self._node} or now_s - self._published_s >= self._rules.heartbeat_s:
            self._published_s = now_s
            with unless_full():
                content = msgspec.json.encode(note)
                write_small(root, paths.RECLAIM_GRANTS, content, self._backend.rights)

    def _wants(self, root: int) -> dict[str, Want]:
        refused, self._refused = self._refused, set()
        wants = {}
        for name in {WHOLE, *self._book.names()}:
            limit = self._limit(root, name)
            want = limit and want_of(
                used_bytes=self._book.used_bytes(name),
                limit_bytes=limit.nbytes,
                trigger=self._rules.trigger,
                share=self._rules.share,
                is_refused=name in refused,
            )
            if want:
                wants[name] = want
        return wants

    def _reclaim(self, root: int, wants: Mapping[str, Want]) -> None:
        worked_since_s = time.monotonic()

        def between(keys: list[Key], freed: Mapping[str, int]) -> None:
            nonlocal worked_since_s
            self._book.deleted(freed)
            if keys:
                self._on_removed(keys)
            self._keep(root)
            nodes = self._hear(root)
            self._grant(root, nodes)
            if not self._is_pressed(root):
                self._stop.wait((time.monotonic() - worked_since_s) * _REST_PER_WORK)
            worked_since_s = time.monotonic()

        run = ReclaimRun(
            self.name,
            self._rules.grace_s,
            self._now_ns,
            between,
            self._recorder,
            salts=self._allowance.quotas.by_salt,
        )
        done = run.run(root, wants)
        self._counts.update(done.counters())
        self._says.done(done, self._rules.grace_s, self._book.used_bytes(WHOLE))
        if not done.is_enough:
            # All that is left is young, or refuses to go.
            gap_s = max(_FRUITLESS_GAP_S, 2 * done.seconds)
            self._quiet_until_s = time.monotonic() + gap_s

    def _is_pressed(self, root: int) -> bool:
        """Writers are about to be refused."""
        limits = [(name, self._limit(root, name)) for name in self._book.names()]
        return any(
            self._book.used_bytes(name) > limit.nbytes * _PRESSED_SHARE
            for name, limit in limits
            if limit is not None
        )
