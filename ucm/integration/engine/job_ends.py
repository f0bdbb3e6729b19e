"""When a copy has ended: every rank has to say so, and vLLM tells how many have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping


class JobEnds:
    """Of the jobs of one engine that are under way. Owned by the engine's thread."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._acks: dict[int, int] = {}
        self._failed: set[int] = set()

    def __len__(self) -> int:
        """How many jobs something is remembered of."""
        return len(self._acks.keys() | self._failed)

    def failed(self, job_id: int) -> None:
        """A rank could not do its part."""
        self._failed.add(job_id)

    def ended(
        self, counts: Mapping[int, int], is_under_way: Callable[[int], bool]
    ) -> Iterator[tuple[int, bool]]:
        """So many more ranks have ended these jobs: which of them have ended now, and whether they
        have failed. Those that nobody knows any more are not counted."""
        for job_id, count in counts.items():
            acks = self._acks.pop(job_id, 0) + count
            if not is_under_way(job_id):
                continue
            if acks < self._world_size:
                self._acks[job_id] = acks
                continue
            failed = job_id in self._failed
            self._failed.discard(job_id)
            yield job_id, failed
