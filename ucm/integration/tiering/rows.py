"""Rows: what vLLM's offloading keeps of one chunk of one group, as pages of the node cache.

A row lies in vLLM's host memory, all ranks side by side, in whatever order their kernels have; here
it is bytes. vLLM's name for one is the hash of the tokens up to its end and the group's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np

from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, fingerprint

_KEY_FORMAT: Final = b"ucm-tiering-key-1"


@dataclass(frozen=True)
class RowShape:
    """Pages that are rows of `page_bytes`. What must agree is all in the manifest."""

    page_bytes: int
    made: Manifest

    @property
    def shard_bytes(self) -> int:
        return self.page_bytes

    @property
    def num_shards(self) -> int:
        return 1

    def manifest(self) -> Manifest:
        return self.made


class RowNames:
    """From vLLM's names to keys, which are one namespace's."""

    def __init__(self, manifest: Manifest) -> None:
        self.fingerprint = fingerprint(manifest)
        self._start = sha256(_KEY_FORMAT + self.fingerprint)

    def key(self, offload_key: bytes) -> Key:
        """SHA256("ucm-tiering-key-1" fingerprint hash group): all but the hash have a fixed
        length, so no two names spell the same bytes."""
        digest = self._start.copy()
        digest.update(offload_key)
        return Key(digest.digest())


@dataclass(frozen=True)
class HostRows:
    """vLLM's host memory, by its address: who keeps a view of it would keep vLLM from giving it
    back."""

    address: int
    num_rows: int
    row_bytes: int

    @classmethod
    def of(cls, view: memoryview) -> HostRows:
        """`view` has one row after the other."""
        assert view.shape is not None and view.strides is not None
        array = np.frombuffer(view, dtype=np.uint8)
        address = int(array.__array_interface__["data"][0])
        return cls(address, int(view.shape[0]), int(view.strides[0]))

    def row(self, number: int) -> int:
        """Its address."""
        if not 0 <= number < self.num_rows:
            raise ValueError(f"row {number}: there are {self.num_rows}")
        return self.address + number * self.row_bytes
