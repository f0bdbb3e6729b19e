"""`ucm reclaim` of a bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.cli.ending import end
from ucm.cli.printing import count, print_json, print_table, say, size

if TYPE_CHECKING:
    from ucm.store.inspect.bucket_reclaim import BucketOrder, ReclaimedBucket
    from ucm.store.inspect.bucket_walk import Bounds, StoredBucket
    from ucm.store.inspect.given import GivenStore

_GIB = 1 << 30
_DAY_S = 86_400
_HOUR_S = 3_600


@dataclass(frozen=True)
class Amount:
    """How much is to go, as it was said."""

    free_gb: float | None
    keep_gb: float | None
    older_than_days: float | None

    def num_said(self) -> int:
        return sum(x is not None for x in (self.free_gb, self.keep_gb, self.older_than_days))

    def order(self, given: GivenStore, grace_s: float | None, *, is_dry: bool) -> BucketOrder:
        from ucm.store.inspect.bucket_reclaim import BucketOrder

        assert given.settings is not None
        store = given.settings.store
        days = self.older_than_days
        return BucketOrder(
            free_bytes=None if self.free_gb is None else int(self.free_gb * _GIB),
            keep_bytes=None if self.keep_gb is None else int(self.keep_gb * _GIB),
            older_than_s=None if days is None else days * _DAY_S,
            grace_s=store.gc_grace_s if grace_s is None else grace_s,
            quarantine_s=store.quarantine_hours * _HOUR_S,
            is_dry=is_dry,
        )


def bucket_to_reclaim(given: GivenStore, tier: str, amount: Amount) -> StoredBucket | None:
    """None: directories. Ends for what fits neither. Raises ConfigError."""
    bucket = given.bucket()
    if tier not in ("", "posix", "s3"):
        end(f"ucm reclaim: --tier {tier}: say posix or s3")
    if (tier == "s3" and bucket is None) or (tier == "posix" and not given.backends):
        end(f"ucm reclaim: --tier {tier}: these settings have no such tier")
    if bucket is not None and given.backends and not tier:
        end("ucm reclaim: which one? --tier posix (storage_backends), or --tier s3 (the bucket)")
    if bucket is None or tier == "posix":
        if amount.keep_gb is not None or amount.older_than_days is not None:
            end("ucm reclaim: --keep-gb and --older-than-days are for buckets: say --free-gb")
        return None
    if amount.num_said() != 1:
        end("ucm reclaim: how much? One of --free-gb, --keep-gb and --older-than-days for a bucket")
    return bucket


def reclaim_bucket(bucket: StoredBucket, order: BucketOrder, bounds: Bounds, as_json: bool) -> bool:
    """Whether as much went as was wanted. Raises TierError."""
    from ucm.store.inspect.bucket_reclaim import reclaim_bucket as reclaimed

    found = reclaimed(bucket, order, bounds)
    if as_json:
        print_json([found])
    else:
        _print(found, is_dry=order.is_dry)
    return found.is_enough and not found.problem


def _print(found: ReclaimedBucket, *, is_dry: bool) -> None:
    went = "would go" if is_dry else "went"
    sizes = (found.stored_bytes, found.wanted_bytes, found.freed_bytes)
    print_table(
        ("bucket", "stored", "to free", went, "pages", "requests", "took"),
        [
            (
                *(found.place, *map(size, sizes), found.num_pages),
                *(found.num_requests, f"{found.seconds:.1f} s"),
            )
        ],
        right=("stored", "to free", went, "pages", "requests", "took"),
    )
    aside = f", {found.num_aside:,} of quarantine" if found.num_aside else ""
    pages = found.num_pages
    ends = count(pages, "page goes", "pages go") if is_dry else count(pages, "page") + " deleted"
    rest = ", if you leave out --dry-run" if is_dry else ""
    say(f"{ends}, {size(found.freed_bytes)}{aside}{rest}.")
    if found.problem:
        say(f"{found.place}: not all could be deleted: {found.problem}", is_error=True)
    elif not found.is_enough and not found.num_young:
        left = "would be left" if is_dry else "is left"
        say(f"{found.place}: no page {left}: it held no more", is_error=True)
    elif not found.is_enough:
        young = count(found.num_young, "page was", "pages were")
        say(f"{found.place}: {young} written within the grace period (--grace-s)", is_error=True)
