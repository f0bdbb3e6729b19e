"""A store's directory as a test sees it: names, whole and damaged files, without a tier's help."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.store.tiers.posix import tree
from ucm.errors import TierError
from ucm.store.blocks.blockfile import (
    HEADER_BYTES,
    BlockId,
    Scratch,
    decode_header,
    read_block,
    write_block,
)
from ucm.store.blocks.keys import Key, block_keys, root_key
from ucm.store.blocks.namespace import from_json
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix import paths

BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Namespace:
    """One directory of a store."""

    fingerprint: bytes
    manifest_json: bytes
    page_bytes: int

    @property
    def layout(self) -> str:
        return from_json(self.manifest_json).layout

    @property
    def block_tokens(self) -> int:
        return from_json(self.manifest_json).block_tokens

    def keys(self, prompt: Sequence[int]) -> list[Key]:
        root = root_key(self.fingerprint, lora_digest=None, cache_salt=None)
        return block_keys(root, prompt, block_tokens=self.block_tokens)


class Store:
    """The directory that the servers of a deployment share, as those of one dtype see it."""

    def __init__(self, folder: Path, kv_dtype: str) -> None:
        self.folder = folder
        self._kv_dtype = kv_dtype
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, kv_dtype: str) -> Store:
        return Store(self.folder, kv_dtype)

    def blocks(self) -> list[Path]:
        """Of all namespaces."""
        return sorted(self.folder.glob("*/??/??/*.kv"))

    def namespace(self, layout: str = "canonical") -> Namespace:
        """The one of this dtype whose layout starts so. Needs a block in it."""
        found = self._namespaces(layout)
        assert len(found) == 1, f"{len(found)} namespaces {layout!r} in {self.folder}"
        return found[0]

    def _namespaces(self, layout: str) -> list[Namespace]:
        found = []
        for file in sorted(self.folder.glob(f"*/{paths.MANIFEST}")):
            text = file.read_bytes()
            manifest = from_json(text)
            block = next(file.parent.glob("??/??/*.kv"), None)
            is_meant = manifest.kv_dtype == self._kv_dtype and manifest.layout.startswith(layout)
            if is_meant and block is not None:
                fingerprint = bytes.fromhex(file.parent.name)
                found.append(Namespace(fingerprint, text, _block_id(block).page_bytes))
        return found

    def files(self, prompt: Sequence[int], layout: str = "canonical") -> list[Path]:
        """Where the prompt's full blocks lie, or will lie."""
        namespace = self.namespace(layout)
        backend, fingerprint = str(self.folder), namespace.fingerprint
        return [Path(paths.block_path(backend, fingerprint, key)) for key in namespace.keys(prompt)]

    def wait_stored(
        self, prompt: Sequence[int], layout: str = "canonical", *, timeout_s: float = 30.0
    ) -> None:
        """Until the prompt's last block is there, which must mean that all are."""
        if len(prompt) < BLOCK_TOKENS:
            return
        deadline_s = time.monotonic() + timeout_s

        def wait() -> None:
            assert time.monotonic() < deadline_s, f"{len(prompt)} tokens: not stored in time"
            time.sleep(0.01)

        while not self._namespaces(layout):
            wait()
        last = self.files(prompt, layout)[-1]
        while not last.exists():
            wait()
        missing = [file for file in self.files(prompt, layout) if not file.exists()]
        assert not missing, "the last block was visible before one that precedes it"

    def bad_files(self) -> list[str]:
        """Blocks that don't verify. Leaves them where they are."""
        return [f"{path}: {why}" for path in self.blocks() if (why := _what_is_wrong(path))]

    def quarantined(self) -> list[Path]:
        return sorted(
            path for path in self.folder.glob(f"{paths.QUARANTINE}/*/*") if path.is_file()
        )

    def unfinished(self) -> list[Path]:
        return sorted(self.folder.rglob(f"*{paths.TEMP_SUFFIX}"))


def flip_bit(path: Path) -> None:
    """One bit of the page, somewhere in its middle."""
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_empty(path: Path) -> None:
    os.truncate(path, 0)


def make_foreign(path: Path) -> None:
    """A sound file of another namespace: same key, same size, all checksums right."""
    block = _block_id(path)
    page = _read_page(path, block)
    foreign = BlockId(block.key, bytes(reversed(block.fingerprint)), block.page_bytes)
    path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_block(fd, foreign, page, num_tokens=BLOCK_TOKENS, scratch=Scratch())
    finally:
        os.close(fd)


def _block_id(path: Path) -> BlockId:
    with path.open("rb") as file:
        return decode_header(file.read(HEADER_BYTES)).block


def _read_page(path: Path, block: BlockId) -> memoryview:
    page = memoryview(mmap.mmap(-1, padded_bytes(block.page_bytes)))
    fd = os.open(path, os.O_RDONLY)
    try:
        read_block(fd, block, page, scratch=Scratch(), chunk_bytes=1 << 20)
    finally:
        os.close(fd)
    return page


def _what_is_wrong(path: Path) -> str:
    named = tree.block_of(str(path.relative_to(path.parents[3])))
    if named is None:
        return "its name is not a block's"
    try:
        block = _block_id(path)
        if (block.key, block.fingerprint) != (named.key, named.fingerprint):
            return "it is another block than its name says"
        _read_page(path, block)
    except (TierError, AssertionError) as error:
        return str(error) or "its header is cut short"
    return ""
