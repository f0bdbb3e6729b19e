"""Rows of vLLM's host memory, and stores of them over real node caches."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from hashlib import sha256, shake_128
from itertools import count
from pathlib import Path
from typing import Any

from tests.store.node.support import SOON_S, Place, wait_until
from ucm.config.settings import Settings
from ucm.integration.tiering.counts import Series, TierCounts
from ucm.integration.tiering.row_store import Ended, RowStore
from ucm.integration.tiering.rows import HostRows
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest
from ucm.store.tiers.posix import paths

ROW_BYTES = 12_288
NUM_ROWS = 16
_engines = count()


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "block_tokens": 4,
        "model_dtype": "float32",
        "kv_dtype": "float32",
        "kv_scales": "none",
        "num_layers": 1,
        "num_kv_heads": 1,
        "k_size": ROW_BYTES,
        "v_size": 0,
        "layout": "opaque:rows",
        "weights": "w",
        "model_shape": {},
        "epoch": 0,
    }
    return Manifest(**{**fields, **changes})


def settings_of(place: Place, node: str, **changes: Any) -> Settings:
    """Patient, where a test is not about patience."""
    most_ms = int(SOON_S * 1000)
    top = {"lookup_timeout_ms": most_ms, "dump_timeout_ms": most_ms, "handoff_timeout_ms": most_ms}
    return Settings(store=place.settings(node), **{**top, **changes})


class Host:
    """One engine's: `NUM_ROWS` rows, and its door to the node cache of `node`."""

    def __init__(self, place: Place, node: str = "a", **changes: Any) -> None:
        self.place = place
        self.memory = memoryview(mmap.mmap(-1, NUM_ROWS * ROW_BYTES))
        self.counts = TierCounts()
        self.settings = settings_of(place, node, **changes)
        view = self.memory.cast("B", shape=[NUM_ROWS, ROW_BYTES])
        self.store = RowStore(
            self.settings,
            HostRows.of(view),
            manifest(),
            name=f"engine-{next(_engines)}",
            counts=self.counts,
        )
        self._numbers = count()
        wait_until(lambda: self.store.is_ready, "the node cache answers")

    def __getitem__(self, row: int) -> bytes:
        return bytes(self.memory[row * ROW_BYTES : (row + 1) * ROW_BYTES])

    def fill(self, keys: Sequence[Key]) -> list[int]:
        """Row i with what is the content of `keys[i]` everywhere."""
        for i, key in enumerate(keys):
            self.memory[i * ROW_BYTES : (i + 1) * ROW_BYTES] = content(key)
        return list(range(len(keys)))

    def begin_dump(self, keys: Sequence[Key]) -> int:
        number = next(self._numbers)
        parents = [b"", *keys[:-1]]
        self.store.store(number, keys, self.fill(keys), parents)
        return number

    def begin_load(self, keys: Sequence[Key]) -> int:
        number = next(self._numbers)
        self.memory[:] = bytes(len(self.memory))
        self.store.load(number, keys, list(range(len(keys))))
        return number

    def end(self) -> Ended:
        """Of the only job under way."""
        (ended,) = wait_until(self.store.take_ended, "a job has ended")
        return ended

    def dump(self, keys: Sequence[Key]) -> Ended:
        self.begin_dump(keys)
        return self.end()

    def load(self, keys: Sequence[Key]) -> set[Key]:
        """Which of them were loaded: what is in their rows is checked, and that others are as they
        were."""
        self.begin_load(keys)
        done = self.end().job.done
        for i, key in enumerate(keys):
            assert self[i] == (content(key) if key in done else bytes(ROW_BYTES))
        return done

    def file(self, key: Key) -> Path:
        return Path(paths.block_path(str(self.place.store), self.store.names.fingerprint, key))

    def wait_files(self, keys: Sequence[Key]) -> None:
        wait_until(lambda: all(self.file(key).exists() for key in keys), "rows in files")

    def counted(self) -> dict[Series, float]:
        return self.counts.take()[0]

    def close(self) -> None:
        self.store.close()


def make_keys(name: str, number: int) -> list[Key]:
    return [Key(sha256(f"{name} {i}".encode()).digest()) for i in range(number)]


def content(key: Key) -> bytes:
    return shake_128(key).digest(ROW_BYTES)
