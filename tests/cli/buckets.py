"""Stores in a bucket of a server of the tests."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import shake_128
from pathlib import Path

import yaml

from tests.cli.conftest import PROMPT
from tests.cli.parts import PAGE_BYTES, keys_of, manifest
from tests.faults.s3_server import BUCKET, S3Server
from tests.store.tiers.s3.s3_tiers import PREFIX, s3_tier
from ucm.store.blocks import namespace
from ucm.store.blocks.keys import Key, num_tokens_of
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.s3.names import Names
from ucm.store.tiers.tier import TierNamespace

A = manifest("a")
B = manifest("b", kv_dtype="fp8")


@dataclass
class BucketStore:
    """`config` is a file of settings for it."""

    server: S3Server
    config: Path

    def put(
        self,
        made: Manifest,
        keys: Iterable[Key],
        page_key: PageKey | None = None,
        *,
        may_be_there: bool = False,
    ) -> None:
        """Pages as another node would have left them."""
        tier = s3_tier(self.server, page_key=page_key)
        where = TierNamespace(namespace.fingerprint(made), PAGE_BYTES, namespace.to_json(made))
        page = memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
        for key in keys:
            page[:PAGE_BYTES] = shake_128(key).digest(PAGE_BYTES)
            tokens = num_tokens_of(key, block_tokens=made.block_tokens)
            staged = tier.stage(where, key, page, num_tokens=tokens)
            assert staged is not None or may_be_there
            if staged is not None:
                tier.publish(staged)

    def name(self, made: Manifest, key: Key) -> str:
        return Names(PREFIX).page(namespace.fingerprint(made), key)

    def has(self, made: Manifest, key: Key) -> bool:
        return self.server.has(self.name(made, key))

    def num_pages(self) -> int:
        return self.server.ask("GET", "?list-type=2").count(b".kv</Key>")


def bucket_settings(directory: Path, server: S3Server, **store: object) -> Path:
    config = {
        "store_pipeline": "Cache|S3",
        "s3_bucket": BUCKET,
        "s3_prefix": PREFIX,
        "s3_endpoint": server.url,
        "posix_gc_grace_sec": 0,
        **store,
    }
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": config}
    path = directory / "bucket.yaml"
    path.write_text(yaml.safe_dump({"ucm_connectors": [connector]}))
    return path


def filled_bucket(directory: Path, server: S3Server) -> BucketStore:
    """6 pages of model a for each of two salts, and 6 of model b."""
    store = BucketStore(server, bucket_settings(directory, server))
    for salt in ("one", "two"):
        store.put(A, keys_of(A, PROMPT, salt=salt))
    store.put(B, keys_of(B, PROMPT))
    return store
