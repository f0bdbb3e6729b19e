"""`ucm reclaim`: free room in a store now, or tell what would go."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import (
    STATUS_WRONG,
    AsJson,
    StoreArgument,
    count,
    print_json,
    print_table,
    progress,
    say,
    size,
)
from ucm.cli.reclaim_bucket import Amount, bucket_to_reclaim, reclaim_bucket
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.store.inspect.given import GivenStore
    from ucm.store.inspect.reclaim_now import ReclaimedNow, ReclaimOrder

_GIB = 1 << 30


class _How(NamedTuple):
    """What `ucm reclaim` was told beside how much is to go. `grace_s` is None for the default."""

    tier: str
    is_dry: bool
    grace_s: float | None
    is_forced: bool
    as_json: bool


def reclaim(
    store: StoreArgument,
    free_gb: Annotated[
        float | None,
        typer.Option(
            "--free-gb", min=0, max=1 << 30, help="how many GiB to free, over all backends"
        ),
    ] = None,
    keep_gb: Annotated[
        float | None,
        typer.Option("--keep-gb", min=0, max=1 << 30, help="how many GiB may stay in a bucket"),
    ] = None,
    older_than_days: Annotated[
        float | None,
        typer.Option(
            "--older-than-days", min=0, max=36_500, help="what was written before goes, of a bucket"
        ),
    ] = None,
    tier: Annotated[
        str, typer.Option("--tier", help="posix or s3, where the settings name both")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="delete nothing, tell what would go")
    ] = False,
    grace_s: Annotated[
        float | None,
        typer.Option(
            "--grace-s", min=0, max=31_536_000, help="what is younger stays (default: 120)"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="beside a node cache that reclaims as well")
    ] = False,
    max_requests: Annotated[
        int, typer.Option("--max-requests", min=1, max=1 << 30, help="how often to ask a bucket")
    ] = 20_000,
    max_s: Annotated[
        float, typer.Option("--max-s", min=1, max=86_400, help="how long to ask a bucket")
    ] = 600.0,
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """Free room while the store is used: tails first, then what was used longest ago.

    Without --free-gb it frees what is above the limit at which the node caches of a settings file
    begin to (posix_capacity_gb). What goes is computed again when it is next asked for. In a bucket
    what was written longest ago goes, as nothing tells when an object was used: say one of
    --free-gb, --keep-gb and --older-than-days.
    """
    of_bucket = Amount(free_gb, keep_gb, older_than_days)
    how = _How(tier, dry_run, grace_s, force, as_json)
    act = partial(_reclaim, store, of_bucket, (max_requests, max_s), how)
    watched("ucm reclaim", store, timeout_s, act)


def _reclaim(store: str, of_bucket: Amount, most: tuple[int, float], how: _How) -> None:
    from ucm.store.inspect.bucket_walk import Bounds
    from ucm.store.inspect.given import given_store
    from ucm.store.inspect.reclaim_now import reclaim_now

    with one_line_for_errors("ucm reclaim"), progress("reclaiming"):
        given = given_store(store, may_be_bucket=True)
        bucket = bucket_to_reclaim(given, how.tier, of_bucket)
        if bucket is not None:
            bucket_order = of_bucket.order(given, how.grace_s, is_dry=how.is_dry)
            bounds = Bounds(*most, are_options=True)
            freed = reclaim_bucket(bucket, bucket_order, bounds, how.as_json)
            raise typer.Exit(0 if freed else STATUS_WRONG)
        order = _order(given, of_bucket.free_gb, how)
        found = [reclaim_now(backend, order) for backend in given.backends]
    if how.as_json:
        print_json(found)
    else:
        _print(found, is_dry=how.is_dry)
    if not all(each.is_enough for each in found):
        raise typer.Exit(STATUS_WRONG)


def _order(given: GivenStore, free_gb: float | None, how: _How) -> ReclaimOrder:
    from ucm.store.inspect.reclaim_now import ReclaimOrder
    from ucm.store.tiers.posix.rights import file_rights

    store = given.settings.store if given.settings is not None else None
    limit_gb = store.capacity_gb * store.gc_trigger_ratio if store is not None else 0.0
    if free_gb is None and not limit_gb:
        end("ucm reclaim: how much? --free-gb GIB, or a settings file with posix_capacity_gb")
    grace_s = how.grace_s
    if grace_s is None:
        grace_s = store.gc_grace_s if store is not None else ReclaimOrder.grace_s
    rights = ReclaimOrder.rights
    if store is not None:
        rights = file_rights(store.file_mode, store.file_group)
    num = len(given.backends)
    return ReclaimOrder(
        free_bytes=None if free_gb is None else int(free_gb * _GIB / num),
        keep_bytes=int(limit_gb * _GIB / num),
        grace_s=grace_s,
        is_dry=how.is_dry,
        is_forced=how.is_forced,
        rights=rights,
    )


def _print(found: list[ReclaimedNow], *, is_dry: bool) -> None:
    went = "would go" if is_dry else "went"
    print_table(
        ("backend", "stored", "to free", went, "pages", "took"),
        [
            (
                *(each.backend, size(each.stored_bytes), size(each.wanted_bytes)),
                *(size(each.freed_bytes), each.num_files, f"{each.seconds:.1f} s"),
            )
            for each in found
        ],
        right=("stored", "to free", went, "pages", "took"),
    )
    pages = sum(each.num_files for each in found)
    nbytes = sum(each.freed_bytes for each in found)
    ends = count(pages, "page goes", "pages go") if is_dry else count(pages, "page") + " deleted"
    say(f"{ends}, {size(nbytes)}{'' if not is_dry else ', if you leave out --dry-run'}.")
    for each in found:
        for line in _remarks(each):
            say(f"{each.backend}: {line}", is_error=True)


def _remarks(found: ReclaimedNow) -> Iterator[str]:
    if found.is_own_clock:
        yield "nothing may be written there, so ages are by this machine's clock"
    if found.problem:
        yield f"not all could be deleted: {found.problem}"
    if found.is_enough:
        return
    if found.num_young:
        pages = count(found.num_young, "page was", "pages were")
        yield f"{pages} written or used within the grace period (--grace-s)"
    elif not found.num_kept:
        yield "no page is left: what is stored beside is in quarantine, or is being written"
    elif not found.problem:
        yield "less than half of it was found: run it again"
