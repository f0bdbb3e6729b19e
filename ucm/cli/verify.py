"""`ucm verify`: is every page whole?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import (
    STATUS_WRONG,
    AsJson,
    StoreArgument,
    count,
    print_json,
    progress,
    say,
    size,
)
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from ucm.store.inspect.verified import Verified

_MAX_SHOWN = 50


def verify(
    store: StoreArgument,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="move damaged files aside, so they are made anew")
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=64, help="how many files to read at a time")
    ] = 2,
    max_mib_per_s: Annotated[
        float, typer.Option("--max-mib-per-s", min=1, max=1e6, help="how fast to read a bucket")
    ] = 100.0,
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """Read every page and check every byte, while the store is used.

    Of a bucket that is a GET for each, and costs what these cost. With a settings file that names a
    page_key_file, seals are checked as well. Ends with 0 if all is whole, and with 3 if a page is
    damaged or can't be read.
    """
    act = partial(_verify, store, quarantine, threads, max_mib_per_s, as_json=as_json)
    watched("ucm verify", store, timeout_s, act)


def _verify(
    store: str, quarantine: bool, num_threads: int, max_mib_per_s: float, *, as_json: bool
) -> None:
    from ucm.store.inspect.bucket_verify import BucketVerifier, ReadPace
    from ucm.store.inspect.given import given_store
    from ucm.store.inspect.verified import VerifiedCounts, VerifyRules
    from ucm.store.inspect.verify import Verifier

    counts = VerifiedCounts()
    found = counts.found
    with one_line_for_errors("ucm verify"), progress("verifying") as on_progress:
        given = given_store(store, may_be_bucket=True)
        rules = VerifyRules(
            page_key=given.page_key(), quarantine=quarantine, num_threads=num_threads
        )
        for backend in given.backends:
            Verifier(rules, counts).run(backend, on_progress)
        bucket = given.bucket()
        if bucket is not None:
            pace = ReadPace(max_mib_per_s * (1 << 20))
            BucketVerifier(rules, counts, pace).run(bucket, on_progress)
    if as_json:
        print_json(found)
    else:
        for bad in found.files[:_MAX_SHOWN]:
            say(f"{bad.condition}: {bad.path}: {bad.why}" + (bad.done and f"; {bad.done}"))
        hidden = found.num_damaged + found.num_unreadable - len(found.files[:_MAX_SHOWN])
        if hidden:
            say(f"... and {count(hidden, 'file')} more")
        say(_sentence(found))
    if found.num_damaged or found.num_unreadable:
        raise typer.Exit(STATUS_WRONG)


def _sentence(found: Verified) -> str:
    whole = f"{count(found.num_whole, 'page is', 'pages are')} whole"
    rate = found.num_bytes / found.seconds if found.seconds else 0
    parts = [
        *([f"{count(found.num_damaged, 'is', 'are')} damaged"] * bool(found.num_damaged)),
        *([f"{found.num_quarantined:,} of them moved aside"] * bool(found.num_quarantined)),
        *([f"{found.num_unreadable:,} could not be read"] * bool(found.num_unreadable)),
        *(
            [f"{found.num_sealed_by_another_key:,} right but for the seal, whose key is not here"]
            * bool(found.num_sealed_by_another_key)
        ),
        *(
            [f"{found.num_other_version:,} of another version, not checked"]
            * bool(found.num_other_version)
        ),
        *([f"{found.num_misplaced:,} where nobody looks for them"] * bool(found.num_misplaced)),
    ]
    read = f"{size(found.num_bytes)} read at {size(rate)}/s"
    return f"{', '.join([whole, *parts])}; {read}."
