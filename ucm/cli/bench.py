"""`ucm bench`: what a mount gives, in pages per second."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import STATUS_WRONG, AsJson, print_json, print_table, progress, say, size
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from ucm.store.inspect.speed import Measured, ProbeLoad, Speed

_OF_DD: Final = 4.0


def bench(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="a directory, or a settings file for its backends")
    ],
    page_kib: Annotated[
        int,
        typer.Option("--page-kib", min=4, max=1 << 20, help="the size of a page (`ucm ls` -n)"),
    ] = 4096,
    total_mib: Annotated[
        int, typer.Option("--mib", min=8, max=1 << 20, help="how much to write each time")
    ] = 256,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=600, help="at most so long each time")
    ] = 5.0,
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """Measure pages per second with 1, 4 and 16 threads, and with and without O_DIRECT.

    Writes files of the store's own kind into a folder of its own, which it removes. `dd` beside it
    is one thread without checksums.
    """
    from ucm.store.inspect.speed import ProbeLoad

    if 2 * page_kib > total_mib << 10:
        end(f"ucm bench: --mib {total_mib}: two pages are more: say {-(-page_kib // 512)} at least")
    load = ProbeLoad(page_kib << 10, total_mib << 20, seconds)
    # What dd flushes at its end is one call, of as much as all threads have written.
    timeout_s += _OF_DD * seconds
    watched("ucm bench", place, timeout_s, partial(_bench, place, load, as_json=as_json))


def _bench(place: str, load: ProbeLoad, *, as_json: bool) -> None:
    from ucm.store.inspect.given import given_place
    from ucm.store.inspect.speed import measure_all

    with one_line_for_errors("ucm bench"), progress("measuring") as on_progress:
        found = [
            measure_all(directory, load, on_progress=on_progress)
            for directory in given_place(place).backends
        ]
    if as_json:
        print_json(found)
    else:
        for measured in found:
            _print(measured)
    if not all(_reads(measured) for measured in found):
        raise typer.Exit(STATUS_WRONG)


def _print(found: Measured) -> None:
    from ucm.store.inspect.remedies import remedy
    from ucm.store.inspect.speed import MAX_MEMORY_BYTES, NUM_THREADS

    say(f"{found.directory}, pages of {size(found.page_bytes)}:")
    rows = [_row(speed) for speed in found.speeds]
    for op, rate in (("write", found.dd_write), ("read", found.dd_read)):
        if rate is not None:
            pages = f"{rate / found.page_bytes:,.0f}"
            rows.append((op, "dd", "1", pages, f"{size(rate)}/s"))
    print_table(
        ("op", "how", "threads", "pages/s", "bytes"), rows, right=("threads", "pages/s", "bytes")
    )
    best = max(_reads(found), key=lambda speed: speed.pages_per_s, default=None)
    left_out = sorted({*NUM_THREADS} - {speed.num_threads for speed in found.speeds})
    if left_out:
        threads = " and ".join(map(str, left_out))
        say(f"Pages of {threads} threads would take more than {size(MAX_MEMORY_BYTES)} of memory.")
    if best is None:
        why = next(speed.problem for speed in found.speeds if speed.problem)
        say(f"Nothing could be read: {why}: {remedy(why)}.")
    else:
        direct = "true" if best.is_direct else "false"
        say(
            f"Reads are fastest with io_direct: {direct} and posix_read_threads: "
            f"{best.num_threads}, {best.pages_per_s:,.0f} pages/s."
        )


def _reads(found: Measured) -> list[Speed]:
    """Those that were measured."""
    return [speed for speed in found.speeds if speed.op == "read" and not speed.problem]


def _row(speed: Speed) -> tuple[str, str, str, str, str]:
    how = "direct" if speed.is_direct else "buffered"
    pages = speed.problem or f"{speed.pages_per_s:,.0f}"
    rate = "" if speed.problem else f"{size(speed.bytes_per_s)}/s"
    return speed.op, how, str(speed.num_threads), pages, rate
