"""One run of reclaim: looks at one pool of shards after the other, and deletes what
reclaim_plan.py chooses of each, until enough is free or all was seen."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_names import key_id_in, key_in
from ucm.store.tiers.posix.reclaim_plan import WHOLE, StoredFile, Want, choose_from_pool, is_young
from ucm.store.tiers.posix.reclaim_record import mark_of
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.shard_walk import Leaf, ShardWalk, close_all

# What goes of a pool scores low among its files and those that were seen before. Few, because
# nothing else of the process runs while they are sorted. Their directories are open meanwhile.
_POOL_FILES = 256
_POOL_LEAVES = 128
# Where storage is slow, a pool is what was seen in this time: writers wait for what goes of it.
_POOL_S = 1.0
_MAX_SEEN = 512


@dataclass
class Reclaimed:
    """`files` and `nbytes` by the account that wanted them gone: the whole store, or a namespace
    or salt that has a quota. `is_enough`: most of what was wanted is free; else `num_kept` files of
    these accounts stay, of which `num_young` are within the grace period. `problem` is the first of
    `num_problems`, for people; `unrecorded` is why not all that went is on record."""

    files: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    is_enough: bool = False
    num_kept: int = 0
    num_young: int = 0
    num_problems: int = 0
    problem: str = ""
    unrecorded: str = ""

    def counters(self) -> dict[str, int]:
        """By the names of the node cache's counters."""
        of_whole = {"files": self.files[WHOLE], "bytes": self.nbytes[WHOLE]}
        total = {"files": self.files.total(), "bytes": self.nbytes.total()}
        return {
            **{f"reclaimed_{what}_capacity": number for what, number in of_whole.items()},
            **{f"reclaimed_{what}_quota": total[what] - of_whole[what] for what in total},
            "reclaim_us": int(self.seconds * 1e6),
        }


class ReclaimStopped(Exception):
    """The process is leaving, or somebody else has the lease."""


@dataclass
class ReclaimRun:
    """`between` is called after each pool with the keys that went and the bytes by account, and
    `tick` after each shard; they raise ReclaimStopped when nothing more is to be deleted. Without a
    `recorder` nothing is deleted, and all is told as if it were. `salts`: the accounts of salts
    that have a quota."""

    path: str
    grace_s: float
    now_ns: Callable[[], int]
    between: Callable[[list[Key], Mapping[str, int]], None]
    recorder: ReclaimRecorder | None
    salts: Collection[str] = ()
    tick: Callable[[], None] = lambda: None
    done: Reclaimed = field(default_factory=Reclaimed)
    _left: dict[str, Want] = field(default_factory=dict)
    _seen: dict[str, deque[StoredFile]] = field(default_factory=dict)

    def run(self, root: int, wants: Mapping[str, Want]) -> Reclaimed:
        """Raises OSError where the store can't be looked at."""
        self._left = dict(wants)
        self._seen = {name: deque(maxlen=_MAX_SEEN) for name in wants}
        started_s = time.monotonic()
        pool: list[Leaf] = []
        num_files, begun_s = 0, started_s
        try:
            shards = ShardWalk(root, self.now_ns, self._trouble, self.salts).shards()
            with closing(shards) as walk:
                for leaves, _ in walk:
                    pool += leaves
                    num_files += sum(len(leaf.files) for leaf in leaves)
                    is_large = num_files >= _POOL_FILES or len(pool) >= _POOL_LEAVES
                    if is_large or (pool and time.monotonic() - begun_s >= _POOL_S):
                        self._thin_out(root, pool)
                        pool, num_files, begun_s = [], 0, time.monotonic()
                        if not self._left:
                            break
                    self.tick()
                else:
                    self._thin_out(root, pool)
                    pool = []
        except ReclaimStopped:
            pass
        finally:
            close_all(leaf.fd for leaf in pool)
        # Shares of small pools don't add up exactly; what is left over is for the next run.
        self.done.is_enough = all(
            left.free_bytes <= wants[name].free_bytes / 2 for name, left in self._left.items()
        )
        self.done.seconds = time.monotonic() - started_s
        return self.done

    def _thin_out(self, root: int, pool: list[Leaf]) -> None:
        """Closes its directories."""
        keys: list[Key] = []
        marks: list[int] = []
        freed: Counter[str] = Counter()
        try:
            leaf_of = {id(file): leaf for leaf in pool for file in leaf.files}
            files = [file for leaf in pool for file in leaf.files]
            now_ns = self.now_ns()
            goes = choose_from_pool(
                files, self._left, seen=self._seen, now_ns=now_ns, grace_s=self.grace_s
            )
            concerned = [each for each in files if not self._seen.keys().isdisjoint(each.accounts)]
            self.done.num_young += sum(
                is_young(each, now_ns=now_ns, grace_s=self.grace_s) for each in concerned
            )
            self.done.num_kept += len(concerned)
            for name, seen in self._seen.items():
                seen.extend(file for file in files if name in file.accounts)
            for file in goes:
                leaf = leaf_of[id(file)]
                if self._delete(leaf, file):
                    self.done.num_kept -= 1
                    keys.append(key_in(file.name))
                    marks.append(mark_of(keys[-1], key_id_in(leaf.namespace)))
                    for name in file.accounts:
                        freed[name] += file.nbytes
        finally:
            close_all(leaf.fd for leaf in pool)
            pool.clear()
            # Also of what went before something failed.
            if self.recorder is not None:
                self.recorder.record(root, self.now_ns(), marks)
                self.done.unrecorded = self.recorder.problem or self.done.unrecorded
        for name in list(self._left):
            self._take_off(name, freed[name])
        self.between(keys, freed)

    def _delete(self, leaf: Leaf, file: StoredFile) -> bool:
        """Whether it is gone."""
        try:
            if self.recorder is not None:
                os.unlink(file.name, dir_fd=leaf.fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            # ESTALE as well: it may lie there, and then its bytes are not free.
            self._trouble(f"{leaf.namespace}/.../{file.name}", error)
            return False
        account = next((name for name in file.accounts[1:] if name in self._left), WHOLE)
        self.done.files[account] += 1
        self.done.nbytes[account] += file.nbytes
        return True

    def _trouble(self, name: str, error: OSError) -> None:
        self.done.num_problems += 1
        self.done.problem = self.done.problem or f"{self.path}/{name}: {error.strerror or error}"

    def _take_off(self, name: str, less: int) -> None:
        want = self._left[name]
        if less >= want.free_bytes:
            del self._left[name]
        elif less:
            self._left[name] = Want(want.free_bytes - less, want.share)
