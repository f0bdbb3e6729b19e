"""What people hear of reclaim: a line for each run, and what is in its way once a minute."""

from __future__ import annotations

import logging
import time

from ucm.errors import TierError
from ucm.store.tiers.posix.os_errors import READ_ONLY_ERRNOS
from ucm.store.tiers.posix.quotas import Limit
from ucm.store.tiers.posix.reclaim_run import Reclaimed

_logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0
_MANY_OTHERS = 1 / 4
_GIB = 1 << 30


class ReclaimSays:
    """Of the backend at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._told_s: dict[str, float] = {}

    def trouble(self, error: OSError | TierError) -> None:
        # Who may only read writes nothing, so needs no limit.
        is_fault = getattr(error, "errno", None) not in READ_ONLY_ERRNOS
        if is_fault and self._may_tell("trouble"):
            _logger.warning("%s: reclaim has to wait: %s", self._path, error)

    def unheard(self, problem: str) -> None:
        """`problem` is about the file of a node."""
        if self._may_tell("unheard"):
            _logger.warning(
                "%s: a node is not heard, so its writes are refused: %s", self._path, problem
            )

    def others(self, limit: Limit, other_bytes: int) -> None:
        """`other_bytes` of a limit are no pages'."""
        if other_bytes > limit.nbytes * _MANY_OTHERS and self._may_tell(f"others {limit.setting}"):
            _logger.warning(
                "%s: files that reclaim can't free (quarantine, temporary files, files that are "
                "not UCM's) take %.2f of the %.2f GiB that %s leaves it: remove them, or set it to "
                "more; beside them less is kept, and nothing is written once the limit is reached",
                self._path,
                other_bytes / _GIB,
                limit.nbytes / _GIB,
                limit.setting,
            )

    def done(self, done: Reclaimed, grace_s: float, used_bytes: int) -> None:
        if done.files:
            _logger.info(
                "%s: reclaimed %d files, %.2f GiB, in %.1f s; about %.2f GiB are used",
                self._path,
                done.files.total(),
                done.nbytes.total() / _GIB,
                done.seconds,
                used_bytes / _GIB,
            )
        if done.problem and self._may_tell("not removed"):
            _logger.warning(
                "%s: reclaim could not remove %d files, the first is %s",
                self._path,
                done.num_problems,
                done.problem,
            )
        if done.unrecorded and self._may_tell("unrecorded"):
            _logger.warning(
                "%s: what is reclaimed is not put on record for ucm explain: %s",
                self._path,
                done.unrecorded,
            )
        if not done.is_enough and done.num_kept and self._may_tell("not enough"):
            _logger.warning(
                "%s: reclaim has freed less than it should: what is left is younger than "
                "posix_gc_grace_sec (%g s), or can't be removed",
                self._path,
                grace_s,
            )

    def _may_tell(self, what: str) -> bool:
        now_s = time.monotonic()
        if now_s - self._told_s.get(what, float("-inf")) < _SAY_EVERY_S:
            return False
        self._told_s[what] = now_s
        return True
