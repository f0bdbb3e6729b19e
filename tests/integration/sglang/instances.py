"""Instances of SGLang over real node caches, as far as their storage backends see them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.integration.sglang.recorded import (
    CacheController,
    HostKVCache,
    MHATokenToKVPoolHost,
    StorageConfig,
)
from tests.store.node.support import SOON_S, Place
from ucm.integration.sglang.hicache import UcmHiCache


def sglangs(module: str) -> Any:
    """A module of SGLang's, whose import warns of much; the test is skipped where it can't be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"sglang.srt.{module}", exc_type=ImportError)


CLASS = {
    "backend_name": "ucm",
    "module_path": "ucm.integration.sglang.hicache",
    "class_name": "UcmHiCache",
    "interface_v1": 1,
}


def extra_config(place: Place, socket: str = "a", **changes: Any) -> dict[str, Any]:
    store = {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(place.store),
        "cache_buffer_capacity_gb": 1 / 32,
        "min_free_gb": 0,
        "node_cache_socket": place.settings(socket).socket_path,
    }
    tree: dict[str, Any] = {
        **CLASS,
        "ucm_connectors": [
            {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        ],
        "model_id": "tiny",
        "lookup_timeout_ms": int(SOON_S * 1000),
        "dump_timeout_ms": int(SOON_S * 1000),
    }
    return {**tree, **changes}


@contextmanager
def rank(
    place: Place,
    socket: str = "a",
    *,
    pool: HostKVCache | None = None,
    config: StorageConfig | None = None,
    **changes: Any,
) -> Iterator[CacheController]:
    """One rank of an instance on the node whose node cache is at `socket`."""
    config = replace(config or StorageConfig(), extra_config=extra_config(place, socket, **changes))
    backend = UcmHiCache(config, {})
    if not hasattr(backend, "on_host_pools_registered"):  # SGLang's base class has it
        backend.on_host_pools_registered = lambda: None
    try:
        yield CacheController(backend, config, pool or MHATokenToKVPoolHost())
    finally:
        backend.close()


def content(name: str, pool: HostKVCache) -> bytes:
    return hashlib.shake_128(name.encode()).digest(len(pool.page(0)))


def compute(
    controller: CacheController, hashes: list[str], pages: list[int], *, who: str = ""
) -> None:
    """Fills pages of the host pool with what the model makes for them, on this rank."""
    for name, page in zip(hashes, pages, strict=True):
        controller.pool.fill(page, content(name + who, controller.pool))


def holds(controller: CacheController, name: str, page: int, *, who: str = "") -> bool:
    return controller.pool.page(page) == content(name + who, controller.pool)
