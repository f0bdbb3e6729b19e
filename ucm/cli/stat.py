"""`ucm stat`: what a node cache does now, like `top`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import AsJson, count, print_json, printable, say, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.store.inspect.node_view import NodeView, NodeWatch

_BAR_CHARS = 30


def stat(
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE",
            help="whose node cache: a settings file, a storage backend's directory, or a socket",
        ),
    ],
    once: Annotated[bool, typer.Option("--once", help="show one interval, and end")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, max=3600, help="seconds between two looks")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch this machine's node cache: slots, queues, rates, and where hits come from.

    With --json a line for each interval. A node cache that is watched does not leave when it is
    idle.
    """
    from ucm.store.inspect.node_view import NodeWatch, settings_to_ask

    with one_line_for_errors("ucm stat"):
        watch = NodeWatch(settings_to_ask(node))
        try:
            _show(_views(watch, interval_s, once=once), as_json=as_json, once=once)
        except KeyboardInterrupt:
            raise typer.Exit from None
        finally:
            watch.close()


def _views(watch: NodeWatch, interval_s: float, *, once: bool) -> Iterator[NodeView]:
    before = watch.sample()
    while True:
        time.sleep(interval_s)
        after = watch.sample()
        yield watch.view(before, after)
        if once:
            return
        before = after


def _show(views: Iterator[NodeView], *, as_json: bool, once: bool) -> None:
    if as_json:
        for view in views:
            print_json(view)
    elif once or not sys.stdout.isatty():
        for view in views:
            for line in lines(view):
                say(line)
    else:
        from rich.live import Live
        from rich.text import Text

        with Live(screen=True, auto_refresh=False) as live:
            for view in views:
                live.update(Text("\n".join(map(printable, lines(view)))), refresh=True)


def lines(view: NodeView) -> list[str]:
    """What is shown of one interval."""
    rates, queues, slots = view.rates, view.queues, view.slots
    used, total = slots["ready"] + slots["filling"], sum(slots.values())
    filled = _BAR_CHARS * used // total if total else 0
    hits = rates.hit_memory + rates.hit_files
    share = f"{100 * hits / rates.blocks_asked:.0f}% hit" if rates.blocks_asked else "none asked"
    overdue = queues["reads_overdue"] + queues["writes_overdue"]
    asked = f"{queues['lookups']:,} lookups, {overdue:,} overdue"
    return [
        f"node cache {view.pid} at {view.socket}",
        f"storage  {', '.join(view.backends) or 'none'}",
        f"clients  {view.num_clients}, holding {count(view.pins, 'pin')}",
        "",
        f"memory   [{'#' * filled}{'.' * (_BAR_CHARS - filled)}] {size(view.capacity_bytes)}",
        f"slots    {_slots(view)}; {rates.evictions:,.0f} evicted/s",
        f"queues   {queues['reads']:,} reads, {queues['write_pages']:,} to write, {asked}",
        *_stalled(view),
        "",
        f"lookups  {rates.lookups:,.0f}/s of {rates.blocks_asked:,.0f} blocks/s: {share}",
        f"hits     {rates.hit_memory:,.0f}/s from memory, {rates.hit_files:,.0f}/s from files",
        f"dumps    {rates.pages_dumped:,.0f} pages/s",
        f"reads    {rates.pages_read:,.0f} pages/s, {size(rates.bytes_read)}/s"
        + _each(view.read_ms),
        f"writes   {rates.pages_written:,.0f} pages/s, {size(rates.bytes_written)}/s"
        + _each(view.write_ms),
        "",
        f"missed   {_counts(view.missed)}",
        f"unwritten {_counts(view.unwritten)}",
        _sentence(view),
    ]


def _slots(view: NodeView) -> str:
    return ", ".join(f"{number:,} {state}" for state, number in view.slots.items())


def _stalled(view: NodeView) -> list[str]:
    return [
        f"STALLED  {what} of {count(number, 'storage backend')}: half of their threads hang"
        for what, number in view.stalled.items()
        if number
    ]


def _each(ms: float | None) -> str:
    return f", {ms:.1f} ms each" if ms is not None else ""


def _counts(by_reason: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in by_reason.items()) or "none"


def _sentence(view: NodeView) -> str:
    if any(view.stalled.values()):
        return "Storage hangs, and is done without."
    if view.unwritten:
        return "Pages were not written: the node cache's log says why."
    return "All is well."
