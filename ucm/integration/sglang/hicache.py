"""The door for SGLang: a HiCacheStorage for `--hicache-storage-backend dynamic` (docs/sglang.md).

    prefetch thread     batch_exists ──► how many pages of a prompt the store has
    prefetch I/O        batch_get_v1 ──► pages into the host pool, verified
    backup thread       batch_set_v1 ──► pages out of the host pool
    scheduler           the constructor, register_mem_pool_host, clear, get_stats, close

SGLang makes one for each rank. What can't be served is refused at the start, by an exception; from
then on a page is there or not, and nothing is raised into SGLang's threads.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from ucm.config.settings import PRIVATE_EPOCH, start_epoch
from ucm.errors import UnsupportedEngine
from ucm.integration.sglang.counts import PageCounts
from ucm.integration.sglang.extra_config import settings_of
from ucm.integration.sglang.host_pool import HostPool
from ucm.integration.sglang.identity import HostPage, host_page
from ucm.integration.sglang.page_store import PageStore
from ucm.integration.sglang.served_model import read_served_model
from ucm.outcome import Outcome
from ucm.store.api.buffers import HostRow
from ucm.store.blocks import namespace

try:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
except ImportError:  # for who reads or tests this file: SGLang takes only what is of its class
    HiCacheStorage = object

logger = logging.getLogger(__name__)

_KV = "kv"
# A file for fewer costs more than it saves.
_FEW_TOKENS = 16
_T = TypeVar("_T")


def _says_no(answer: Callable[[Any], _T]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Whatever goes wrong in a method, its thread of SGLang's goes on: with `answer`, made of what
    the method was asked for."""

    def decorate(method: Callable[..., _T]) -> Callable[..., _T]:
        @wraps(method)
        def guarded(backend: UcmHiCache, *args: Any, **kwargs: Any) -> _T:
            try:
                return method(backend, *args, **kwargs)
            except Exception:
                logger.exception("a defect: %s", method.__name__)
                backend.counts.missed("defect", Outcome.IO_ERROR, 1)
                return answer(next(iter((*args, *kwargs.values())), ()))

        return guarded

    return decorate


def _no_pages(asked: Sequence[Any]) -> list[bool]:
    return [False] * len(asked)


class UcmHiCache(HiCacheStorage):
    """Of one rank."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """`kwargs` is what SGLang's factory may say one day. Raises ConfigError."""
        del kwargs
        self.counts = PageCounts()
        self._config = storage_config
        self._settings = settings_of(storage_config.extra_config)
        for warning in self._settings.warnings:
            logger.warning("%s", warning)
        self._page: HostPage | None = None
        self._pool: HostPool | None = None
        self._store: PageStore | None = None

    # -- the scheduler ---------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Starts the node cache if there is none. Raises UnsupportedEngine and ConfigError."""
        self.close()
        self.mem_pool_host = mem_pool_host
        self._page = host_page(
            self._config,
            mem_pool_host,
            self._settings,
            served=read_served_model(),
            epoch=start_epoch(self._settings),
        )
        self._pool = HostPool(mem_pool_host, self._page.buffer_sizes)
        self._open()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """SGLang names all of its pools, the first one again. Raises UnsupportedEngine."""
        if host_pool is self.mem_pool_host or str(host_pool_name) == _KV:
            return
        self.close()
        raise UnsupportedEngine(
            f"this model keeps {host_pool_name} states beside its KV, which the store doesn't "
            f"serve under SGLang: leave out --hicache-storage-backend"
        )

    def clear(self) -> None:
        """What was stored before is not found any more by this instance, whose weights may be
        others now. The store is shared, so nothing is deleted."""
        if self._page is None:
            return
        self.close()
        self._page = self._page.in_epoch(PRIVATE_EPOCH + secrets.randbelow(PRIVATE_EPOCH))
        logger.warning(
            "the storage was cleared: from now on this rank shares pages with nobody, until it is "
            "started again"
        )
        self._open()

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()
            logger.info("pages of this rank: %s", self.counts)

    @_says_no(lambda asked: None)
    def get_stats(self) -> Any:
        """SGLang's StorageMetrics since the last call; None where SGLang doesn't want them."""
        loads, dumps = self.counts.take()
        if not getattr(self._config, "enable_storage_metrics", False):
            return None
        try:
            from sglang.srt.observability.metrics_collector import StorageMetrics
        except ImportError:
            return None
        return StorageMetrics(
            prefetch_pgs=list(loads.pages),
            backup_pgs=list(dumps.pages),
            prefetch_bandwidth=list(loads.gb_per_s),
            backup_bandwidth=list(dumps.gb_per_s),
        )

    # -- SGLang's threads ------------------------------------------------------------------

    @_says_no(lambda asked: 0)
    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many pages from the first on can be loaded."""
        del extra_info
        store = self._store
        return store.stored(keys) if store is not None and keys else 0

    @_says_no(_no_pages)
    def batch_get_v1(
        self, keys: Sequence[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Fills pages of the host pool, and says which; none after the first that is not there."""
        del extra_info
        return self._transfer(keys, self._rows_of(host_indices), is_load=True)

    @_says_no(_no_pages)
    def batch_set_v1(
        self, keys: Sequence[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Stores pages of the host pool, and says which can be loaded now."""
        del extra_info
        return self._transfer(keys, self._rows_of(host_indices), is_load=False)

    # -- one by one, by addresses in the order of a page's buffers -----------------------------

    @_says_no(lambda asked: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """`target_location`, filled, or None."""
        rows = self._rows_at([target_location], [target_sizes])
        return target_location if all(self._transfer([key], rows, is_load=True)) else None

    @_says_no(lambda asked: [None] * len(asked))
    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        rows = self._rows_at(target_locations, target_sizes)
        filled = self._transfer(keys, rows, is_load=True)
        return [
            location if there else None
            for location, there in zip(target_locations or filled, filled, strict=False)
        ]

    @_says_no(lambda asked: False)
    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """A tensor is refused: SGLang packs it in another order than its pages have."""
        del value
        rows = self._rows_at([target_location], [target_sizes])
        return all(self._transfer([key], rows, is_load=False))

    @_says_no(lambda asked: False)
    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        del values
        rows = self._rows_at(target_locations, target_sizes)
        return all(self._transfer(keys, rows, is_load=False))

    @_says_no(lambda asked: False)
    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # -- models that have more than one pool are refused; SGLang may ask all the same ---------

    @_says_no(lambda asked: {})
    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, Any]:
        del extra_info
        return {each.name: _no_pages(each.keys or ()) for each in transfers}

    @_says_no(lambda asked: {})
    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, Any]:
        return self.batch_get_v2(transfers, extra_info)

    # -- parts -----------------------------------------------------------------------------

    def _open(self) -> None:
        page = self._page
        assert page is not None
        manifest = page.manifest()
        if page.page_tokens < _FEW_TOKENS:
            logger.warning(
                "a page is %d tokens, and a file each: use --page-size 64", page.page_tokens
            )
        logger.info("UCM namespace %s: %s", namespace.fingerprint(manifest).hex()[:16], manifest)
        stores = _is_writer(self._config)
        self._store = PageStore(self._settings, page, self.counts, stores=stores)
        try:
            self._store.wait_opened()
        except BaseException:
            self.close()
            raise

    def _rows_of(self, host_indices: Any) -> Callable[[int], list[HostRow] | None]:
        pool = self._pool
        return lambda num_pages: None if pool is None else pool.rows(num_pages, host_indices)

    def _rows_at(self, locations: Any, sizes: Any) -> Callable[[int], list[HostRow] | None]:
        pool = self._pool
        return lambda num_pages: (
            None
            if pool is None or len(locations or ()) != num_pages or len(sizes or ()) != num_pages
            else pool.rows_at(locations, sizes)
        )

    def _transfer(
        self,
        keys: Sequence[str],
        rows_of: Callable[[int], list[HostRow] | None],
        *,
        is_load: bool,
    ) -> list[bool]:
        store = self._store
        if store is None or not keys:
            return _no_pages(keys)
        rows = rows_of(len(keys))
        if rows is None:
            self.counts.missed(
                "not_loaded" if is_load else "not_stored",
                Outcome.UNSUPPORTED,
                len(keys),
                "SGLang has given other memory than pages of the registered pool",
            )
            return _no_pages(keys)
        return store.load(keys, rows) if is_load else store.dump(keys, rows)


def _is_writer(config: Any) -> bool:
    """Older versions have no word for it."""
    is_writer = getattr(config, "is_storage_writer", None)
    if is_writer is None:
        return not config.is_mla_model or int(config.tp_rank) == 0
    return bool(is_writer)
