"""The store for engines other than vLLM, and for scripts: UCM's interface over the node cache.

    store = UcmPipelineStore({"storage_backends": "/mnt/kv", "tensor_size_list": [65536, 65536]})
    task = store.dump(block_ids, [0] * len(block_ids), [[k, v], ...])
    store.wait(task)                    # readable on this node; store.flush(): in files
    store.lookup_on_prefix(block_ids)   # the index of the last block that is there
    store.wait(store.load(block_ids, [0] * len(block_ids), [[k, v], ...]))

The same node cache serves this and vLLM's connector: one copy in memory per node, verified files,
no file I/O in this process. What a caller must know:

* A block id is any bytes. It names a block within a *namespace*, which is `unique_id` and the sizes
  of the tensors: stores that differ in these don't see each other's blocks.
* A block is `block_size / shard_size` shards, and visible when all of them were dumped, by this
  object, each within `timeout_ms` of the one before. Never in part.
* Bytes are right or absent: a load that can't fill all of its memory fails, and says why.
* Everything ends within `timeout_ms` (30 s): tasks fail then, and touch no memory any more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from ucm.config.settings import CONNECTOR_NAME, StoreSettings, load_settings
from ucm.errors import ConfigError, TaskFailed, TierError
from ucm.outcome import Outcome
from ucm.store.api.buffers import Row, host_row
from ucm.store.api.driver import Driver
from ucm.store.api.dumps import dump
from ucm.store.api.loads import find, load, prefetch
from ucm.store.api.pages import Part
from ucm.store.api.questions import batch_blocks
from ucm.store.api.shards import SHARD_KEYS, BlockNames, block_shape
from ucm.store.api.tasks import Task
from ucm.store.api.unsaved import lacking, not_written
from ucm.store.blocks import namespace
from ucm.store.blocks.keys import Key
from ucm.store.client.start import log_path
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices
from ucm.store.tiers.build import keeps_pages

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    from ucm.store.api.tensors import Tensors

logger = logging.getLogger(__name__)

_DEFAULT_TIMEOUT_MS: Final = 30_000
# The store's thread ends every task in time; this is for the case that it is stuck in a copy.
_GRACE_S: Final = 10.0
_FIRST_FIND: Final = 64
_MAX_FIND: Final = 1 << 14
_FLUSH_POLL_S: Final = 0.02
_HERE: Final = p.IN_MEMORY | p.QUEUED | p.IN_STORAGE


class UcmPipelineStore:
    """One user's view of the store. Any thread may call any method."""

    def __init__(self, config: Mapping[str, object]) -> None:
        """`config` is what UCM calls ucm_connector_config, with the sizes of blocks (shards.py).

        Starts the node cache if there is none. Raises ConfigError for what can't work, and
        NodeUnavailable when there is no node cache in time.
        """
        self._shape = block_shape(config)
        self._settings = _store_settings(config)
        self._timeout_s = _timeout_ms(config) / 1000
        device_id = config.get("device_id", -1)
        self._addresses_are_on_device = isinstance(device_id, int) and device_id >= 0
        fingerprint = namespace.fingerprint(self._shape.manifest())
        self._names = BlockNames(fingerprint)
        self._driver = Driver(
            self._settings,
            self._shape,
            name=f"store-{os.getpid()}-{uuid.uuid4().hex}",
            timeout_s=self._timeout_s,
        )
        # Also when the object is forgotten, and before the interpreter takes the tensors away.
        self._close = weakref.finalize(self, self._driver.close)
        try:
            self._driver.wait_opened()
        except BaseException:
            self._close()
            raise
        self._notices, self._notices_lock = Notices(time.monotonic), threading.Lock()
        self._capacity_bytes = self._driver.shared.pages.capacity_bytes
        self._batch = batch_blocks(self._shape.page_bytes, self._capacity_bytes)
        logger.info(
            "namespace %s: unique_id %s, %d shards of tensors of %s bytes",
            fingerprint.hex(),
            self._shape.unique_id,
            self._shape.num_shards,
            list(self._shape.tensor_sizes),
        )

    # -- questions -------------------------------------------------------------------------

    def lookup(self, block_ids: Sequence[bytes]) -> list[bool]:
        """Whether each block can be loaded now. What storage can't tell in time is False, and
        logged. Raises TaskFailed when there is no node cache to ask."""
        keys = self._keys(block_ids)
        return [bool(place & _HERE) for place in self._find(keys, storage=False)]

    def lookup_on_prefix(self, block_ids: Sequence[bytes]) -> int:
        """How far all blocks can be loaded: the index of the last one, -1 if there is none."""
        keys = self._keys(block_ids)
        start, count = 0, _FIRST_FIND
        # In growing steps, because a cold prompt ends at its first block.
        while start < len(keys):
            places = self._find(keys[start : start + count], storage=False)
            for i, place in enumerate(places):
                if not place & _HERE:
                    return start + i - 1
            start, count = start + count, count * 8
        return len(keys) - 1

    # -- transfers -------------------------------------------------------------------------

    def prefetch(self, block_ids: Sequence[bytes]) -> None:
        """Starts to bring blocks from storage into the node cache. A hint: it can't fail, and in a
        pipeline without `Cache`, where nothing stays in memory, it does nothing."""
        if keeps_pages(self._settings) and block_ids:
            # More than half of the memory would push out its own beginning.
            most = self._capacity_bytes // 2 // self._shape.page_bytes
            keys = self._keys(block_ids)
            self._driver.start(partial(prefetch, keys=keys, batch=self._batch, max_blocks=most))

    def load(
        self,
        block_ids: Sequence[bytes],
        shard_index: Sequence[int],
        dst_tensor: Tensors,
    ) -> Task:
        """Starts to fill tensors: `dst_tensor[i][j]` with tensor j of shard `shard_index[i]` of
        block `block_ids[i]`. They must not be touched until the task has ended."""
        return self._load(block_ids, shard_index, self._tensor_rows(dst_tensor))

    def dump(
        self,
        block_ids: Sequence[bytes],
        shard_index: Sequence[int],
        src_tensor: Tensors,
    ) -> Task:
        """Starts to store tensors, which must not change until the task has ended. A block that is
        there already is not copied again."""
        return self._dump(block_ids, shard_index, self._tensor_rows(src_tensor))

    def load_data(
        self,
        block_ids: Sequence[bytes],
        shard_index: Sequence[int],
        dst_addr: Sequence[Sequence[object]] | np.ndarray,
    ) -> Task:
        """`load` into plain memory: addresses in this process, which the caller keeps alive until
        the task has ended, or writable buffers."""
        return self._load(block_ids, shard_index, self._host_rows(dst_addr, writable=True))

    def dump_data(
        self,
        block_ids: Sequence[bytes],
        shard_index: Sequence[int],
        src_addr: Sequence[Sequence[object]] | np.ndarray,
        prerequisite_handle: int = 0,
    ) -> Task:
        """`dump` from plain memory: addresses in this process, or buffers."""
        if prerequisite_handle:
            raise ValueError("prerequisite_handle is for device memory: dump tensors instead")
        return self._dump(block_ids, shard_index, self._host_rows(src_addr, writable=False))

    def wait(self, task: Task) -> None:
        """Until the task has ended, at most `timeout_ms` after it began.

        A load is done when all of its memory is filled, a dump when its blocks can be read on this
        node, by any process; storage follows in the background (see `flush`). Raises TaskFailed
        with the block and the reason otherwise. What a failed load has filled is undefined.
        """
        if not task.wait(self._timeout_s + _GRACE_S):
            raise TaskFailed("the store's thread is stuck in a copy: its memory is still in use")

    def check(self, task: Task) -> bool:
        """Whether the task has ended, well or badly. Never blocks, never raises."""
        return task.has_ended

    def flush(self, timeout_s: float | None = None) -> None:
        """Until all blocks that were dumped here (the last 65536) since a flush has confirmed them
        are in storage, in each tier of the pipeline: all are asked for each of them, now. What has
        gone from one meanwhile is written again from memory.

        Raises TierError, which names them, when some are not there, or not in time (default:
        `timeout_ms`). In a pipeline without storage there is nothing to wait for.
        """
        if not self._settings.has_storage:
            return
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        unsaved = self._driver.shared.unsaved
        dumped = unsaved.all()
        waiting = list(dumped)
        lost: dict[Key, int] = {}
        while waiting:
            places = dict(zip(waiting, self._find(waiting, storage=True), strict=True))
            for key in (key for key in waiting if places[key] & p.IN_STORAGE):
                unsaved.is_saved(key, dumped[key])
            for key in waiting:
                if not places[key] & (p.IN_STORAGE | p.QUEUED):
                    lost[key] = places[key]
            waiting = [key for key in waiting if places[key] & p.QUEUED]
            if waiting and time.monotonic() > deadline_s:
                where = lacking(self._settings.tiers, [places[key] for key in waiting])
                raise TierError(
                    f"{len(waiting)} blocks still wait to be written to {where}",
                    reason=Outcome.TIMEOUT,
                )
            if waiting:
                time.sleep(_FLUSH_POLL_S)
        if lost:
            where = lacking(self._settings.tiers, lost.values())
            said = not_written([dumped[key] for key in lost], where)
            raise TierError(
                f"{said}; the log of the node cache says why: {log_path(self._settings)}",
                reason=Outcome.IO_ERROR,
            )

    def close(self) -> None:
        """Fails what is under way, and leaves the node cache. May be repeated."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- parts -----------------------------------------------------------------------------

    def _keys(self, block_ids: Sequence[bytes]) -> list[Key]:
        key_of = self._names.key
        return [key_of(block_id) for block_id in block_ids]

    def _find(self, keys: Sequence[Key], *, storage: bool) -> Iterator[int]:
        for start in range(0, len(keys), _MAX_FIND):
            asked = keys[start : start + _MAX_FIND]
            task = self._driver.start(partial(find, keys=asked, storage=storage))
            self.wait(task)
            found: p.Found = task.result
            if found.reason:
                self._say_unsure(found.reason)
            yield from found.places

    def _say_unsure(self, reason: Outcome) -> None:
        """In an outage every lookup ends like this one."""
        with self._notices_lock:
            self._notices.warn("storage could not tell about some blocks", reason, of=reason)

    def _tensor_rows(self, tensors: Tensors) -> list[Row]:
        from ucm.store.api.tensors import tensor_rows

        return tensor_rows(tensors, self._shape.tensor_sizes)

    def _host_rows(
        self, entries: Sequence[Sequence[object]] | np.ndarray, *, writable: bool
    ) -> Sequence[Row]:
        if self._addresses_are_on_device:
            raise ValueError("device_id is set: memory of a device is loaded and dumped as tensors")
        sizes = self._shape.tensor_sizes
        return [host_row(row, sizes, writable=writable) for row in entries]

    def _parts(
        self, block_ids: Sequence[bytes], shard_index: Sequence[int], rows: Sequence[Row]
    ) -> list[Part]:
        if not len(block_ids) == len(shard_index) == len(rows):
            raise ValueError(
                f"{len(block_ids)} block ids, {len(shard_index)} shard indexes, {len(rows)} rows"
            )
        shards = range(self._shape.num_shards)
        for shard in shard_index:
            if shard not in shards:
                raise ValueError(f"shard {shard}: a block has the shards {shards}")
        keys = self._keys(block_ids)
        return [Part(*each) for each in zip(block_ids, keys, shard_index, rows, strict=True)]

    def _load(
        self, block_ids: Sequence[bytes], shard_index: Sequence[int], rows: Sequence[Row]
    ) -> Task:
        parts = self._parts(block_ids, shard_index, rows)
        steps = partial(
            load,
            parts=parts,
            batch=self._batch,
            pages=self._driver.shared.pages,
            log_path=self._driver.log_path,
        )
        return self._driver.start(steps)

    def _dump(
        self, block_ids: Sequence[bytes], shard_index: Sequence[int], rows: Sequence[Row]
    ) -> Task:
        parts = self._parts(block_ids, shard_index, rows)
        steps = partial(dump, parts=parts, batch=self._batch, shared=self._driver.shared)
        return self._driver.start(steps)


def _store_settings(config: Mapping[str, object]) -> StoreSettings:
    """The settings of the store among `config`. Raises ConfigError."""
    store = {name: value for name, value in config.items() if name not in _OWN_KEYS}
    connector = {"ucm_connector_name": CONNECTOR_NAME, "ucm_connector_config": store}
    settings = load_settings({"ucm_connectors": [connector]}, source=CONNECTOR_NAME)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    return settings.store


_OWN_KEYS: Final = SHARD_KEYS | {"timeout_ms", "device_id"}


def _timeout_ms(config: Mapping[str, object]) -> int:
    value = config.get("timeout_ms", _DEFAULT_TIMEOUT_MS)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{CONNECTOR_NAME}: timeout_ms: expected a number > 0, got {value!r}")
    return value
