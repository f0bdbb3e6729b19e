"""How much this process may still write into one backend, by what its limit leaves.

Writers count what they write; who knows how full the store is (reclaim.py) grants them more. An
account is the whole store, or a namespace or a salt that has a quota. Promise: what is written of
an account never exceeds what was granted for it. Before anything was granted, because nobody has
counted the store yet, that is the pages of one write queue, and at most an eighth of the limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import SALT_TAG_BYTES, Key
from ucm.store.tiers.posix.quotas import Limit, Quotas, salt_account
from ucm.store.tiers.posix.reclaim_plan import WHOLE

_GIB = 1 << 30
_UNKNOWN_SHARE = 8
_NEVER = 1 << 62


@dataclass(frozen=True)
class Allowed:
    """Of one account, since this process began: bytes written, how far that may go, and what of
    it is being written, so may not be in storage yet."""

    written_bytes: int
    up_to_bytes: int | None
    in_flight_bytes: int = 0


@dataclass
class _AccountBook:
    limit_bytes: int
    setting: str
    written_bytes: int = 0
    in_flight_bytes: int = 0
    # None: nobody has counted yet.
    up_to_bytes: int | None = None
    # When that much is written, more should be granted.
    low_at_bytes: int = 0
    is_refused: bool = False


@dataclass
class Allowance:
    """Of one backend. Thread-safe. `wake` is set when more should be granted soon."""

    path: str
    quotas: Quotas
    queue_pages: int
    wake: threading.Event = field(default_factory=threading.Event)
    clock: Callable[[], float] = time.monotonic
    num_refused: int = 0
    _until_s: float = float("inf")
    _accounts: dict[str, _AccountBook] = field(default_factory=dict)
    # Of each namespace, its accounts and that of the whole.
    _names: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, namespace: str, key: Key, nbytes: int, *, manifest: bytes) -> None:
        """A page of the namespace's is about to be written; then `landed` or `give_back` follows.
        Raises TierError if it must not."""
        if not self.quotas:
            return
        with self._lock:
            accounts = self._of(namespace, key, manifest)
            for account in accounts:
                if not self._fits(account, nbytes):
                    account.is_refused = account.up_to_bytes is not None
                    self.num_refused += 1
                    self.wake.set()
                    raise self._refused(account)
            for account in accounts:
                account.written_bytes += nbytes
                account.in_flight_bytes += nbytes
                if account.written_bytes >= account.low_at_bytes:
                    account.low_at_bytes = _NEVER
                    self.wake.set()

    def landed(self, namespace: str, key: Key, nbytes: int) -> None:
        """Who counts what is stored finds it."""
        with self._lock:
            for account in self._opened(namespace, key):
                account.in_flight_bytes -= nbytes

    def give_back(self, namespace: str, key: Key, nbytes: int) -> None:
        """It was not written after all, or has been removed again."""
        with self._lock:
            for account in self._opened(namespace, key):
                account.in_flight_bytes -= nbytes
                account.written_bytes -= nbytes

    def grant(self, up_to_bytes: Mapping[str, int]) -> None:
        """By account, how far `written_bytes` may go. Others keep what they have."""
        with self._lock:
            for name, nbytes in up_to_bytes.items():
                account = self._accounts.get(name)
                if account is None or account.up_to_bytes == nbytes:
                    continue
                # Less than before, and part of that may be written by now.
                account.up_to_bytes = max(nbytes, account.written_bytes)
                account.low_at_bytes = (account.written_bytes + account.up_to_bytes) // 2

    def keep_until(self, until_s: float) -> None:
        """Others hear of this node; after this time they count what was granted as written."""
        self._until_s = until_s

    def allowed(self) -> dict[str, Allowed]:
        """By account, of those that were written to."""
        with self._lock:
            return {
                name: Allowed(each.written_bytes, each.up_to_bytes, each.in_flight_bytes)
                for name, each in self._accounts.items()
            }

    def is_low(self) -> bool:
        """Whether more should be granted soon."""
        with self._lock:
            return any(each.low_at_bytes == _NEVER for each in self._accounts.values())

    def take_refusals(self) -> set[str]:
        """The accounts that writers were refused for, since this was asked last."""
        with self._lock:
            refused = {name for name, each in self._accounts.items() if each.is_refused}
            for name in refused:
                self._accounts[name].is_refused = False
        return refused

    def _of(self, namespace: str, key: Key, manifest: bytes) -> list[_AccountBook]:
        """The accounts of a page. Called with the lock."""
        names = self._names.get(namespace)
        if names is None:
            limits = {WHOLE: self.quotas.whole, namespace: self.quotas.of(namespace, manifest)}
            names = [name for name, limit in limits.items() if self._has(name, limit)]
            self._names[namespace] = names
        if self.quotas.by_salt:
            salt = _salt_account_of(key)
            if self._has(salt, self.quotas.by_salt.get(salt)):
                names = [*names, salt]
        return [self._accounts[name] for name in names]

    def _opened(self, namespace: str, key: Key) -> list[_AccountBook]:
        """Those of a page that was taken for. Called with the lock."""
        names = (WHOLE, namespace, _salt_account_of(key))
        return [self._accounts[name] for name in names if name in self._accounts]

    def _has(self, name: str, limit: Limit | None) -> bool:
        """Whether there is such an account. Opens it if there should be."""
        if limit is not None and name not in self._accounts:
            self._accounts[name] = _AccountBook(limit.nbytes, limit.setting)
        return limit is not None

    def _fits(self, account: _AccountBook, nbytes: int) -> bool:
        up_to_bytes = account.up_to_bytes
        if up_to_bytes is None:
            up_to_bytes = min(self.queue_pages * nbytes, account.limit_bytes // _UNKNOWN_SHARE)
        elif self.clock() > self._until_s:
            return False
        return account.written_bytes + nbytes <= up_to_bytes

    def _refused(self, account: _AccountBook) -> TierError:
        if account.up_to_bytes is None:
            return TierError(
                f"{self.path}: what is stored has to be counted first, for {account.setting}: more "
                f"is written as soon as it is",
                reason=Outcome.FULL,
            )
        return TierError(
            f"{self.path}: {account.setting} leaves it {account.limit_bytes / _GIB:.2f} GiB, and "
            f"these are used: nothing is written until older pages are reclaimed; if that goes on, "
            f"set it to more",
            reason=Outcome.FULL,
        )


def _salt_account_of(key: Key) -> str:
    """If its key has a salt."""
    return salt_account(key[-SALT_TAG_BYTES:])
