"""Pages of SGLang's host pool as plain memory: addresses, in the order that the pool gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucm.store.api.buffers import HostRow


class HostPool:
    """`buffer_sizes` are those of each page, in bytes."""

    def __init__(self, pool: Any, buffer_sizes: tuple[int, ...]) -> None:
        self._pool = pool
        self._sizes = buffer_sizes

    def rows(self, num_pages: int, host_indices: Any) -> list[HostRow] | None:
        """The pages that begin at every page_size-th index. None if these are not `num_pages`, or
        not of this size."""
        pool = self._pool
        if len(host_indices) != num_pages * int(pool.page_size):
            return None
        addresses, sizes = pool.get_page_buffer_meta(host_indices)
        width = len(self._sizes)
        if tuple(sizes) != self._sizes * num_pages or len(addresses) != len(sizes):
            return None
        # SGLang lets go of the memory of a pool that it throws away.
        owners = (getattr(pool, "kv_buffer", None),)
        return [
            HostRow([int(each) for each in addresses[start : start + width]], self._sizes, owners)
            for start in range(0, num_pages * width, width)
        ]

    def rows_at(self, locations: Sequence[Any], sizes: Sequence[Any]) -> list[HostRow] | None:
        """One page each, by the addresses of its buffers (or its only one) and their sizes. None if
        that is anything else."""
        rows = []
        for location, size in zip(locations, sizes, strict=True):
            addresses = [location] if isinstance(location, int) else location
            given = (size,) if isinstance(size, int) else size
            if not isinstance(addresses, (list, tuple)) or not isinstance(given, (list, tuple)):
                return None
            if tuple(given) != self._sizes or len(addresses) != len(self._sizes):
                return None
            if not all(isinstance(each, int) and each for each in addresses):
                return None
            rows.append(HostRow(list(addresses), self._sizes))
        return rows
