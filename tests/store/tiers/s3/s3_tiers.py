"""Tiers on a server of the tests."""

from __future__ import annotations

from typing import Any

from tests.faults.s3_server import BUCKET, REGION, S3Server
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.s3.breaker import BucketBreaker
from ucm.store.tiers.s3.bucket import Bucket, BucketPlace
from ucm.store.tiers.s3.tier import S3Tier

PREFIX = "some/where"
PAUSE_S = 0.3


def s3_tier(
    server: S3Server,
    *,
    page_key: PageKey | None = None,
    quarantine_per_minute: int = 6,
    **changes: Any,
) -> S3Tier:
    """`changes` are of the BucketPlace."""
    changed = {"bucket": BUCKET, "region": REGION, "endpoint": server.url, **changes}
    place = BucketPlace(**changed)
    return S3Tier(
        Bucket(place, BucketBreaker(PAUSE_S)),
        place=f"s3://{place.bucket}/{PREFIX}",
        prefix=PREFIX,
        page_key=page_key,
        quarantine_per_minute=quarantine_per_minute,
    )
