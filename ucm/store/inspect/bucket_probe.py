"""Tries out a bucket: what may be done there, and how fast; and says what that means for a store.

Works on objects of its own below the prefix, and removes them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Final

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.inspect.bucket_walk import Bounds, OutOfBounds, StoredBucket
from ucm.store.inspect.verdicts import Finding, Verdict, Wishes
from ucm.store.inspect.within import Trial

if TYPE_CHECKING:
    from ucm.store.tiers.s3.listed_bucket import ListedBucket, ListedObject

# Of a bucket that may be read, and not written.
WRITE_RIGHT: Final = "write right"
_PROBE: Final = "ucm-probe-"
_NUM_THREADS: Final = 8
_NUM_LOOKS: Final = 8
# Of a server that takes so long for all of them, no more are tried.
_MIN_LOOKS: Final = 3
_LOOKS_S: Final = 0.2
# As many are tried at once as would take so long one after the other.
_AT_ONCE_S: Final = 0.5
# What one answer to a listing holds.
_MOST_SEEN: Final = 1_000
_NAMESPACES_SEEN: Final = 3
# What lies in a bucket beside is passed over, a request for each of its folders.
_MOST_LISTS: Final = 30
_LISTS_S: Final = 1.0
_DAY_S: Final = 86_400
_PROMPT_BLOCKS: Final = 128
_SKEW_S: Final = 2.0
_MIB: Final = 1 << 20
_LIST_RIGHT: Final = (
    "allow s3:ListBucket: without it a server says denied of what isn't there, so each miss is an "
    "error"
)


@dataclass
class BucketProbe:
    """Of one run."""

    bucket: StoredBucket
    page_bytes: int
    wishes: Wishes
    trial: Trial
    found: list[Finding] = field(default_factory=list)

    def run(self) -> list[Finding]:
        """Never raises for what storage does."""
        probe = self.bucket.name_of(f"{_PROBE}{secrets.token_hex(8)}")
        names = [f"{probe}/{i}" for i in range(_NUM_THREADS)]
        moved, aside = f"{probe}/moved", f"{probe}/aside"
        objects, made = self.bucket.objects, False
        # What is only asked, and not measured, is asked meanwhile.
        with ThreadPoolExecutor(2) as beside:
            left = beside.submit(self._left, objects, probe)
            try:
                # Of a server that hangs the rest would only take longer.
                if self._reached(objects, f"{probe}/absent") and self._wrote(objects, names[0]):
                    made = True
                    moving = beside.submit(self._moved, objects, moved, aside)
                    self._looks(objects, names[0])
                    self._speeds(objects, names)
                    self.trial.doing = "moving an object aside"
                    self.found.append(moving.result())
                elif any(each.check == WRITE_RIGHT for each in self.found):
                    self._looks(objects, f"{probe}/absent")
            finally:
                if made:
                    self._delete(objects, [*names, moved, aside])
            if not any(
                each.check in ("endpoint", "credentials") and each.fix for each in self.found
            ):
                self.trial.doing = "listing"
                self.found += left.result()
        return self.found

    def _say(self, check: str, verdict: Verdict, found: str, fix: str = "") -> None:
        self.found.append(Finding(check=check, verdict=verdict, found=found, fix=fix))

    def _reached(self, objects: ListedBucket, absent: str) -> bool:
        """Whether it is worth while to go on."""
        self.trial.doing = "asking for an object that isn't there"
        try:
            # The first request connects, and is not what is measured.
            objects.get(absent, most_bytes=0)
            took_s, _ = _timed(lambda: objects.get(absent, most_bytes=0))
        except TierError as error:
            why = str(error)
            if "there are no credentials" in why:
                fix = "give them to whoever starts the engines, and to this tool"
                self._say("credentials", "wrong", why, fix)
                return False
            if "access is denied" not in why:
                fix = "look at s3_endpoint, s3_region, s3_bucket, and at the server; engines go on"
                self._say("endpoint", "wrong", why, fix)
                return False
            self._say("list right", "wrong", why, f"look at the credentials; and {_LIST_RIGHT}")
            return True
        self._say("endpoint", "fine", f"answers in {1000 * took_s:.1f} ms, and knows the bucket")
        self._say("list right", "fine", "of what isn't there it says so")
        return True

    def _wrote(self, objects: ListedBucket, name: str) -> bool:
        self.trial.doing = "writing an object"
        try:
            may = objects.put_if_allowed(name, os.urandom(_MIB))
        except TierError as error:
            self._say("write", "wrong", str(error), "look at the bucket's policy and quota")
            return False
        if not may:
            fix = "allow s3:PutObject: else pages of this node stay in its memory"
            self._say(WRITE_RIGHT, "warning", "access is denied", fix)
        return may

    def _looks(self, objects: ListedBucket, name: str) -> None:
        self.trial.doing = "looking up an object"
        try:
            now_s = time.time()
            seen = objects.look(name)
            looks_s: list[float] = []
            while len(looks_s) < _MIN_LOOKS or (
                len(looks_s) < _NUM_LOOKS and sum(looks_s) < _LOOKS_S
            ):
                looks_s.append(_timed(lambda: objects.tag(name))[0])
        except TierError as error:
            self._say("read", "wrong", str(error), "allow s3:GetObject: nothing is found without")
            return
        took_s = median(looks_s)
        threads = self.wishes.read_threads
        prompt_s = -(-_PROMPT_BLOCKS // threads) * took_s
        found = (
            f"HEAD {1000 * took_s:.1f} ms; of {_PROMPT_BLOCKS} blocks, {threads} at a time, "
            f"{1000 * prompt_s:.0f} ms"
        )
        is_slow = prompt_s > self.wishes.lookup_timeout_s
        fix = (
            "lookups will be late: raise posix_read_threads or lookup_timeout_ms, or use a nearer "
            "server"
        )
        self._say("latency", "warning" if is_slow else "fine", found, fix if is_slow else "")
        if seen is None:
            return
        skew_s = seen.modified_s - now_s
        if abs(skew_s) <= _SKEW_S:
            self._say("clock", "fine", "as this machine's")
        else:
            found = f"objects' times are {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
            fix = "run NTP: signatures are refused from 15 minutes on, and `ucm reclaim` goes by it"
            self._say("clock", "warning", found, fix)

    def _speeds(self, objects: ListedBucket, names: Sequence[str]) -> None:
        content = os.urandom(self.page_bytes)

        def put(name: str) -> None:
            objects.put(name, [content])

        def get(name: str) -> None:
            got = objects.get(name, most_bytes=len(content))
            if got is None or got.content != content:
                what = f"{name}: other bytes came back than were written"
                raise TierError(what, reason=Outcome.CORRUPT)

        for check, act in (("put", put), ("get", get)):
            if self.trial.stop.is_set():
                return
            self.trial.doing = f"measuring {check.upper()}"
            try:
                each_s, _ = _timed(partial(act, names[0]))
                if check == "put":
                    names = names[: max(1, int(_AT_ONCE_S / each_s))]
                all_s = _all_at_once(act, names) if len(names) > 1 else each_s
            except TierError as error:
                self._say(check, "wrong", str(error), "allow it; or look at the server")
                return
            self._say(check, *self._speed(check, each_s, len(names) / all_s, len(names)))

    def _speed(self, check: str, each_s: float, per_s: float, num: int) -> tuple[Verdict, str, str]:
        """Verdict, what was found and what to do, for people."""
        found = (
            f"{1000 * each_s:.0f} ms for {self.page_bytes / _MIB:.1f} MiB, {per_s:,.0f} pages/s "
            f"({num} at once): {per_s * self.page_bytes / _MIB:,.0f} MiB/s"
        )
        if check == "put":
            return "fine", found, ""
        tokens = per_s * self.wishes.block_tokens
        found += f", {tokens:,.0f} tokens/s; {_PROMPT_BLOCKS} blocks {_PROMPT_BLOCKS / per_s:.1f} s"
        prefill = self.wishes.prefill_tokens_per_s
        if not prefill:
            return "fine", found, "loading pays where the engine's prefill is slower than that"
        if tokens < prefill:
            fix = f"recomputing at {prefill:,.0f} tokens/s is faster: use a nearer server"
            return "warning", found, fix
        return "fine", found, ""

    def _moved(self, objects: ListedBucket, name: str, to: str) -> Finding:
        try:
            objects.put(name, [b"ucm"])
            objects.move(name, to)
        except TierError as error:
            fix = (
                f"allow s3:DeleteObject: else damaged objects stay, and cost a read each time; and "
                f"remove what is below {name.rpartition('/')[0]}"
            )
            return Finding(check="delete", verdict="warning", found=str(error), fix=fix)
        found = "objects can be moved aside and deleted"
        return Finding(check="delete", verdict="fine", found=found)

    def _delete(self, objects: ListedBucket, names: Sequence[str]) -> None:
        self.trial.doing = "deleting what was written"
        with suppress(TierError):
            objects.delete(names)

    def _left(self, objects: ListedBucket, own: str) -> list[Finding]:
        """What others have left in it."""
        bounds = Bounds(_MOST_LISTS, _LISTS_S)
        try:
            below, probes = self.bucket.name_of("").rstrip("/"), self.bucket.name_of(_PROBE)
            # Those of this very run may be among them.
            left = _first(objects.listed(below, after=probes))
            num_aside = 0
            with suppress(OutOfBounds):
                for _ in islice(self.bucket.aside(bounds), _MOST_SEEN):
                    num_aside += 1
            written_s = self._written_s(bounds)
        except TierError as error:
            fix = "allow s3:ListBucket, which `ucm reclaim` needs; node caches list nothing"
            return [Finding(check="list", verdict="note", found=str(error), fix=fix)]
        findings = []
        if any(name.startswith(probes) and not name.startswith(own) for name in left):
            found = f"objects below {probes}... of a tool that was killed"
            findings.append(
                Finding(check="leftovers", verdict="note", found=found, fix="delete them")
            )
        if num_aside:
            at_least = " at least" * (num_aside == _MOST_SEEN)
            found = f"{num_aside:,} objects in quarantine{at_least}"
            fix = "storage, memory or a cable damages data: look at them, then remove them"
            findings.append(Finding(check="quarantine", verdict="warning", found=found, fix=fix))
        found = "no tool can ask here whether the bucket has a rule that takes old pages away"
        if written_s:
            days = (time.time() - min(written_s)) / _DAY_S
            found += f"; the oldest of {len(written_s):,} pages was written {days:.1f} days ago"
        fix = "look at it: docs/storage.md; or run `ucm reclaim`"
        return [*findings, Finding(check="lifecycle", verdict="note", found=found, fix=fix)]

    def _written_s(self, bounds: Bounds) -> list[float]:
        """When some pages were written. They are sorted by key, which is any. Raises TierError."""
        found: list[float] = []
        with suppress(OutOfBounds):
            for namespace in self.bucket.namespaces(bounds)[:_NAMESPACES_SEEN]:
                pages = islice(self.bucket.pages_in(namespace, bounds), _MOST_SEEN)
                found += [page.modified_s for page in pages if page is not None]
        return found


def _timed(act: Callable[[], object]) -> tuple[float, object]:
    started_s = time.perf_counter()
    done = act()
    return time.perf_counter() - started_s, done


def _all_at_once(act: Callable[[str], None], names: Sequence[str]) -> float:
    with ThreadPoolExecutor(len(names)) as threads:
        return _timed(lambda: [*threads.map(act, names)])[0]


def _first(answers: Iterator[list[ListedObject]]) -> list[str]:
    return [each.name for each in next(answers, [])]
