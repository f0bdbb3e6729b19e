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
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.allowance import Allowance
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.grants import NodeAccount, granted
from ucm.store.tiers.posix.lease import ReclaimLease
from ucm.store.tiers.posix.plain_files import NotPlain
from ucm.store.tiers.posix.quotas import Limit
from ucm.store.tiers.posix.reclaim_beats import ReclaimBeats
from ucm.store.tiers.posix.reclaim_plan import WHOLE, ReclaimRules, Want, want_of
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.reclaim_run import ReclaimRun, ReclaimStopped
from ucm.store.tiers.posix.reclaim_says import ReclaimSays
from ucm.store.tiers.posix.small_files import read_small
from ucm.store.tiers.posix.stored_count import UsedBook, count_stored
from ucm.store.tiers.tier import Chore

_LEAST_GAP_S = 0.05
# After a run that could not free what it should, because all is young or storage refuses: at least
# so long, and of the time that the run has computed. What it has waited for storage is no reason to
# leave writers waiting any longer.
_FRUITLESS_GAP_S = 1.0
_GAP_PER_WORK = 2.0
# Of the time that it works, how long it rests while writers can wait for it.
_REST_PER_WORK = 1.0
_MOST_REST_S = 1.0
_PRESSED_SHARE = 0.9
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Reclaimer(Chore):
    """Of one backend. `run` is one thread's; the rest is for any."""

    def __init__(self, backend: Backend, allowance: Allowance, rules: ReclaimRules) -> None:
        self.name = backend.path
        self._backend = backend
        self._allowance = allowance
        self._rules = rules
        self._lease = ReclaimLease(rules.stale_s, rules.heartbeat_s, rules.deletes, backend.rights)
        self._beats = ReclaimBeats(allowance, rules, backend.rights)
        self._book = UsedBook()
        self._stop = threading.Event()
        self._on_removed: Callable[[list[Key]], None] = lambda keys: None
        self._counts: Counter[str] = Counter()
        self._counted_s = self._beaten_s = float("-inf")
        self._count_took_s = 0.0
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
            "stored_bytes": self._beats.stored_bytes,
            "stored_other_bytes": self._beats.other_bytes,
            "stored_limit_bytes": 0 if whole is None else whole.nbytes,
            "reclaim_leases": int(self._lease.is_held),
            "reclaim_refused_writes": self._allowance.num_refused,
        }

    def _wait(self) -> None:
        quiet_s = self._quiet_until_s - time.monotonic()
        gap_s = min(max(_LEAST_GAP_S, quiet_s), self._rules.heartbeat_s)
        if not self._stop.wait(gap_s):
            self._allowance.wake.wait(max(0.0, self._beats.gap_s - gap_s))
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
        os.unlink(self._beats.node, dir_fd=root)

    # -- a beat ----------------------------------------------------------------------------

    def _beat_once(self, root: int) -> None:
        self._beats.say(root)
        was_held = self._lease.is_held
        if self._lease.hold(root):
            self._beaten_s = time.monotonic()
            if not was_held:
                with suppress(NotPlain):  # what is published takes its place, or says why not
                    self._beats.obey(root)  # what another one has granted last
            self._govern(root)
        else:
            self._counted_s = float("-inf")
            self._beats.obey(root)

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
        nodes = self._beats.hear(root)
        if self._beats.problem:
            self._says.unheard(self._beats.problem)
        self._book.heard(nodes)
        return nodes

    def _count(self, root: int, nodes: Mapping[str, Mapping[str, NodeAccount]]) -> None:
        started_s = time.monotonic()
        count = count_stored(
            root,
            self._beats.now_ns,
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
            self._beats.say(root)
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
            manifest = None
            with suppress(TierError):  # `ucm verify` tells of it
                manifest = read_small(root, f"{name}/{paths.MANIFEST}")
            if manifest is None:
                return quotas.of(name, b"")
            self._limits[name] = quotas.of(name, manifest)
        return self._limits[name]

    def _grant(self, root: int, nodes: Mapping[str, Mapping[str, NodeAccount]]) -> None:
        up_to: dict[str, dict[str, int]] = {node: {} for node in nodes}
        used = {WHOLE: self._book.used_bytes(WHOLE)}
        for name in {WHOLE, *self._book.names()}:
            limit = self._limit(root, name)
            if limit is None:
                continue
            used[name] = self._book.used_bytes(name)
            other_bytes = self._book.other_bytes(name)
            self._says.others(limit, other_bytes)
            shares = granted(
                limit_bytes=max(0, limit.nbytes - other_bytes),
                used_bytes=self._book.most_bytes(name) - other_bytes,
                nodes={node: each[name] for node, each in nodes.items() if name in each},
                spare_share=self._rules.spare_share,
                refused=self._beats.refusing(name),
            )
            for node, nbytes in shares.items():
                up_to[node][name] = nbytes
        self._beats.publish(root, used, up_to, other_bytes=self._book.other_bytes(WHOLE))

    def _wants(self, root: int) -> dict[str, Want]:
        refused = self._beats.take_refused()
        wants = {}
        for name in {WHOLE, *self._book.names()}:
            limit = self._limit(root, name)
            want = limit and want_of(
                used_bytes=self._book.used_bytes(name),
                limit_bytes=limit.nbytes,
                trigger=self._rules.trigger,
                share=self._rules.share,
                is_refused=name in refused,
                other_bytes=self._book.other_bytes(name),
            )
            if want:
                wants[name] = want
        return wants

    def _reclaim(self, root: int, wants: Mapping[str, Want]) -> None:
        worked_since_s, computing_since_s = time.monotonic(), time.thread_time()

        def between(keys: list[Key], freed: Mapping[str, int]) -> None:
            nonlocal worked_since_s
            self._book.deleted(freed)
            if keys:
                self._on_removed(keys)
            self._keep(root)
            nodes = self._hear(root)
            self._grant(root, nodes)
            if not self._is_pressed(root):
                worked_s = time.monotonic() - worked_since_s
                self._stop.wait(min(worked_s * _REST_PER_WORK, _MOST_REST_S))
            worked_since_s = time.monotonic()

        run = ReclaimRun(
            self.name,
            self._rules.grace_s,
            self._beats.now_ns,
            between,
            self._recorder,
            tick=lambda: self._keep(root),
            salts=self._allowance.quotas.by_salt,
        )
        done = run.run(root, wants)
        self._counts.update(done.counters())
        self._says.done(done, self._rules.grace_s, self._book.used_bytes(WHOLE))
        if not done.is_enough:
            # All that is left is young, or refuses to go.
            computed_s = time.thread_time() - computing_since_s
            gap_s = max(_FRUITLESS_GAP_S, _GAP_PER_WORK * computed_s)
            self._quiet_until_s = time.monotonic() + gap_s

    def _is_pressed(self, root: int) -> bool:
        """Writers are about to be refused."""
        limits = [(name, self._limit(root, name)) for name in self._book.names()]
        return any(
            self._book.used_bytes(name) > limit.nbytes * _PRESSED_SHARE
            for name, limit in limits
            if limit is not None
        )
