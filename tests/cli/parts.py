"""Stores to look at, and the `ucm` command as a person runs it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import shake_128
from pathlib import Path
from typing import Any

import yaml

from ucm.store.blocks import namespace
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key, block_keys, num_tokens_of, root_key, tail_key
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import TierNamespace

ROOT = Path(__file__).parents[2]
BLOCK_TOKENS = 16
PAGE_BYTES = 20_001
SOON_S = 60.0


def ucm(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ucm.cli.main", *map(str, args)]
    env = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=SOON_S, **more
    )


def manifest(name: str, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "block_tokens": BLOCK_TOKENS,
        "model_dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "kv_scales": "none",
        "num_layers": 2,
        "num_kv_heads": 1,
        "k_size": 8,
        "v_size": 8,
        "layout": "canonical",
        "weights": f"model_id:{name}",
        "model_shape": {"hidden_size": 64},
        "epoch": 0,
    }
    return Manifest(**{**fields, **changes})


def keys_of(
    made: Manifest, prompt: Sequence[int], *, salt: str | None = None, lora: bytes | None = None
) -> list[Key]:
    root = root_key(namespace.fingerprint(made), lora_digest=lora, cache_salt=salt)
    return block_keys(root, prompt, block_tokens=made.block_tokens, cache_salt=salt)


def tail_of(made: Manifest, prompt: Sequence[int], *, salt: str | None = None) -> Key:
    """The key of what is behind the last full block."""
    keys = keys_of(made, prompt, salt=salt)
    root = root_key(namespace.fingerprint(made), lora_digest=None, cache_salt=salt)
    start, size = len(keys) * made.block_tokens, made.block_tokens
    parent = keys[-1] if keys else root
    return tail_key(parent, prompt[start:], block_tokens=size, first_token=start, cache_salt=salt)


@dataclass
class Store:
    """One backend."""

    path: Path

    def put(
        self,
        made: Manifest,
        keys: Iterable[Key],
        *,
        tier: PosixTier | None = None,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        """Pages as another node would have left them."""
        tier = tier or PosixTier([str(self.path)])
        fingerprint = namespace.fingerprint(made)
        where = TierNamespace(fingerprint, page_bytes, namespace.to_json(made))
        tier.open_namespace(where)
        page = memoryview(mmap.mmap(-1, padded_bytes(page_bytes)))
        for key in keys:
            page[:page_bytes] = shake_128(key).digest(page_bytes)
            staged = tier.stage(
                where, key, page, num_tokens=num_tokens_of(key, block_tokens=made.block_tokens)
            )
            assert staged is not None
            tier.publish(staged)

    def file(self, made: Manifest, key: Key, key_id: bytes = b"") -> Path:
        backend, fingerprint = str(self.path), namespace.fingerprint(made)
        return Path(paths.block_path(backend, fingerprint, key, key_id))

    def names(self) -> set[str]:
        """All that is in it, to see that nothing was changed."""
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")}


def settings_file(directory: Path, backend: Path, **store: object) -> Path:
    """With one storage backend, and these settings of the store."""
    config = {"storage_backends": str(backend), **store}
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": config}
    path = directory / "ucm.yaml"
    path.write_text(yaml.safe_dump({"ucm_connectors": [connector]}))
    return path


def flip_bit(path: Path, offset: int = HEADER_BYTES + 123) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 8
    path.write_bytes(content)
