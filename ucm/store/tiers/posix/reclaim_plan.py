"""Which files go when a store is too large. Pure: (files, now, policy) -> files to delete.

A run never knows all files. It looks at the shards of the store (first and second byte of the key)
in a random order, a pool of them at a time, and deletes of each pool the share that scores lowest:
keys are digests, so every pool is a fair sample of the whole. What a run costs therefore grows with
what it deletes, and not with what is kept.

* Tails go first: only a prompt that ends with exactly these tokens can use one.
* Then what has the lowest score. A file's score is its time of change, which a use moves on.
* Never what has changed within the grace period, by the filesystem's own word: somebody may have
  been promised it.
* Every namespace and salt that has a quota first gives what it has too much, of its own files only;
  then all give together what the store has too much.
* What is no page can't be freed, and leaves pages less of a limit; but a quarter of it is theirs
  whatever else is there, so that nothing empties a store that has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The account of the whole store, beside those of namespaces and salts.
WHOLE = ""
_SECOND_NS = 1_000_000_000
# Less of a pool than this is no fair share of so few files.
_LEAST_SHARE = 1 / 32
# A page that does not fit is less than the rest.
_REFUSED_TRIGGER = 0.9
_LEAST_FOR_PAGES = 1 / 4


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One page. `score_ns`: what the policy goes by, the file's time of change. `changed_ns`: when
    it was last written, named or touched, by the filesystem's own clock. `accounts`: those that it
    counts for, the whole store first."""

    name: str
    nbytes: int
    score_ns: int
    changed_ns: int
    is_tail: bool = False
    accounts: tuple[str, ...] = (WHOLE,)


@dataclass(frozen=True, slots=True)
class Want:
    """What an account has to give: `free_bytes` in all, and of each pool the lowest `share`."""

    free_bytes: int
    share: float


@dataclass(frozen=True)
class ReclaimRules:
    """`deletes`: whether this node may. `trigger` and `share`: of a limit, see
    `want_of`. The store is counted anew every `check_s`."""

    deletes: bool = True
    trigger: float = 0.7
    share: float = 0.1
    grace_s: float = 120.0
    check_s: float = 30.0
    heartbeat_s: float = 7.5
    stale_s: float = 60.0

    @property
    def spare_share(self) -> float:
        """Of a limit, what may be granted and not written: with it all open, reclaim begins before
        the rest is written."""
        return max(1 - self.trigger, 1 - _REFUSED_TRIGGER) / 2


def choose(
    files: Sequence[StoredFile], *, free_bytes: int, now_ns: int, grace_s: float
) -> list[StoredFile]:
    """The files to delete so that `free_bytes` are free, in the order in which they go. Less than
    that where the rest is too young."""
    chosen: list[StoredFile] = []
    for file in sorted(files, key=_order):
        if free_bytes <= 0:
            break
        if not is_young(file, now_ns=now_ns, grace_s=grace_s):
            chosen.append(file)
            free_bytes -= file.nbytes
    return chosen


def is_young(file: StoredFile, *, now_ns: int, grace_s: float) -> bool:
    """It stays, whatever is wanted."""
    return file.changed_ns > now_ns - int(grace_s * _SECOND_NS)


def choose_from_pool(
    pool: Sequence[StoredFile],
    wants: Mapping[str, Want],
    *,
    seen: Mapping[str, Sequence[StoredFile]],
    now_ns: int,
    grace_s: float,
) -> list[StoredFile]:
    """What goes of a pool. `wants`: by account, what is still to be freed. `seen`: of each account,
    files that were seen before in this run, gone or not: what goes of a pool scores low among these
    as well, so that a small pool gives nothing that is used."""
    chosen: dict[int, StoredFile] = {}
    for account in sorted(wants, key=lambda name: name == WHOLE):
        want = wants[account]
        here = {id(file): file for file in pool if account in file.accounts}
        both = [*here.values(), *seen.get(account, ())]
        share_bytes = int(want.share * sum(file.nbytes for file in both))
        low = choose(both, free_bytes=share_bytes, now_ns=now_ns, grace_s=grace_s)
        left_bytes = want.free_bytes - sum(here[each].nbytes for each in chosen if each in here)
        for file in low:
            if left_bytes > 0 and id(file) in here and id(file) not in chosen:
                chosen[id(file)] = file
                left_bytes -= file.nbytes
    return list(chosen.values())


def want_of(
    *,
    used_bytes: int,
    limit_bytes: int,
    trigger: float,
    share: float,
    is_refused: bool = False,
    other_bytes: int = 0,
) -> Want | None:
    """What an account has to give: if its pages are at their trigger, or so many that a writer was
    refused, a `share` of them, and at least what is above the trigger. `other_bytes` of those that
    are used are no pages'."""
    pages_bytes = used_bytes - other_bytes
    most_bytes = limit_of_pages(limit_bytes, other_bytes)
    mark_bytes = int(most_bytes * (min(trigger, _REFUSED_TRIGGER) if is_refused else trigger))
    if pages_bytes <= 0 or pages_bytes < mark_bytes:
        return None
    free_bytes = max(int(pages_bytes * share), pages_bytes - mark_bytes, 1)
    return Want(free_bytes, min(1.0, max(free_bytes / pages_bytes, _LEAST_SHARE)))


def limit_of_pages(limit_bytes: int, other_bytes: int) -> int:
    """How much pages may take beside `other_bytes` that are none, and can't be freed."""
    return max(limit_bytes - other_bytes, int(limit_bytes * _LEAST_FOR_PAGES))


def _order(file: StoredFile) -> tuple[bool, int, str]:
    return not file.is_tail, file.score_ns, file.name
