"""Deciding what is read for a client that would sooner compute than wait for slow storage."""

from __future__ import annotations

from ucm.store.node.lookup_state import BlockState, LookupJob
from ucm.store.node.read_worth import worth_reading


def weigh(job: LookupJob) -> None:
    """As far as it can be known by now: a prefix that is not worth reading may be so with what
    follows. Pages that an engine of this node brings cost nothing, however late they are."""
    costs, start = job.costs, job.first_open()
    if costs is None or job.closed or start is None:
        return
    is_read = _is_read(job, start, grows=costs.each < 1)
    known = start + len(is_read)
    job.worth_end = start + worth_reading(is_read, costs)
    reads = any(is_read)
    # Each page more is worth it, too.
    is_all_worth = costs.each < 1 and job.worth_end == known and reads
    # Slow storage brings what was promised: it will bring the rest as well, and as slowly.
    is_brought = known < job.promised and reads
    if known == job.end or is_all_worth or is_brought:
        job.costs = None
        if not is_all_worth and job.worth_end < job.end:
            job.refused = job.end - job.worth_end
            job.end = job.worth_end


def _is_read(job: LookupJob, start: int, *, grows: bool) -> list[bool]:
    """For each block from `start` on of which it is known whether its page must be read. What is
    promised will be there; it is counted before it is if a prefix `grows` in worth with it."""
    is_read = []
    for i in range(start, job.end):
        state = job.state(i)
        is_found = state not in (BlockState.UNKNOWN, BlockState.ASKED)
        if not is_found and not (i < job.promised and (grows or job.is_fed)):
            break
        is_free = state is BlockState.HERE or (job.is_fed and state is not BlockState.STORED)
        is_read.append(not is_free)
    return is_read
