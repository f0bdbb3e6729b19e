"""From the pipeline in the settings to the tier behind the node cache.

`Cache` is the node cache itself, which is always there: it is how pages reach storage without file
I/O in an engine. The stages behind it are tiers, the nearest first. ucm/config/settings.py reads
`store_pipeline` and refuses what it doesn't know; a new kind of tier is named there and built here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.store.blocks.page_key import page_key_of
from ucm.store.tiers.posix.quotas import quotas_of
from ucm.store.tiers.posix.reclaim_plan import ReclaimRules
from ucm.store.tiers.posix.rights import file_rights
from ucm.store.tiers.posix.space import FreeSpace
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import NoTier, Tier

if TYPE_CHECKING:
    from ucm.store.tiers.s3.bucket import BucketPlace

NODE_CACHE_STAGE = "Cache"


def _posix(settings: StoreSettings) -> Tier:
    min_free_gb = settings.min_free_gb
    return PosixTier(
        settings.storage_backends,
        direct_io=settings.direct_io,
        free=FreeSpace(
            min_free_bytes=None if min_free_gb is None else int(min_free_gb * (1 << 30)),
            queue_pages=settings.write_queue_pages,
            quotas=quotas_of(
                settings.capacity_gb,
                settings.quota_gb or {},
                num_backends=len(settings.storage_backends),
            ),
            rules=ReclaimRules(
                deletes=settings.gc_enable,
                trigger=settings.gc_trigger_ratio,
                share=settings.gc_recycle_share,
                grace_s=settings.gc_grace_s,
                check_s=settings.gc_check_interval_s,
                heartbeat_s=settings.heartbeat_s,
                stale_s=settings.stale_s,
            ),
        ),
        quarantine_per_minute=settings.quarantine_per_minute,
        page_key=page_key_of(settings.page_key_file),
        rights=file_rights(settings.file_mode, settings.file_group),
    )


def _s3(settings: StoreSettings) -> Tier:
    # Only who stores in a bucket has the client.
    try:
        from ucm.store.tiers.s3.breaker import BucketBreaker
        from ucm.store.tiers.s3.bucket import Bucket
        from ucm.store.tiers.s3.tier import S3Tier
    except ModuleNotFoundError as error:
        raise _no_client(error) from error

    return S3Tier(
        Bucket(bucket_place(settings), BucketBreaker(settings.retry_ms / 1000)),
        place=settings.s3_place,
        prefix=settings.s3_prefix,
        quarantine_per_minute=settings.quarantine_per_minute,
        page_key=page_key_of(settings.page_key_file),
    )


def bucket_place(settings: StoreSettings) -> BucketPlace:
    """Of the S3 stage. Raises ConfigError where the client isn't installed."""
    try:
        from ucm.store.tiers.s3.bucket import BucketPlace
    except ModuleNotFoundError as error:
        raise _no_client(error) from error

    assert settings.s3_bucket, "the S3 stage without a bucket: config should have refused it"
    return BucketPlace(
        bucket=settings.s3_bucket,
        region=settings.s3_region,
        endpoint=settings.s3_endpoint,
        path_style=settings.s3_path_style,
        tls_ca_file=settings.s3_tls_ca_file,
        credentials_file=settings.s3_credentials_file,
        timeout_s=settings.io_timeout_ms / 1000,
    )


def _no_client(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"store_pipeline: the S3 stage needs the package {error.name}: pip install 'ucm[s3]'"
    )


TIER_STAGES: dict[str, Callable[[StoreSettings], Tier]] = {"Posix": _posix, "S3": _s3}


def build_tiers(settings: StoreSettings) -> tuple[Tier, ...]:
    """The tiers behind the node cache, the nearest first; `NoTier` if its memory is all there is.
    Reads the page key and a certificate, and nothing else. Raises ConfigError."""
    stages = [stage for stage in settings.pipeline if stage != NODE_CACHE_STAGE]
    return tuple(TIER_STAGES[stage](settings) for stage in stages) or (NoTier(),)


def keeps_pages(settings: StoreSettings) -> bool:
    """Whether pages stay in memory after use. Without the `Cache` stage they only pass through."""
    return NODE_CACHE_STAGE in settings.pipeline
