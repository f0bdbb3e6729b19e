"""How subcommands print: JSON or a table for people, and a bar on a terminal while they work.

All that they print goes through here. What is read from a store was written by anybody who may
write there: what would move a cursor, begin a line or hide text is shown as its escape.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
StoreArgument = Annotated[
    str,
    typer.Argument(metavar="STORE", help="a storage backend's directory, or a settings file"),
]
EngineNamespace = Annotated[
    str,
    typer.Option(
        "--namespace",
        "-n",
        help="the engine's, if several may be: only of models with windows or states",
    ),
]
EngineFlags = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- FLAGS]", help="the engine's flags, as in -- --kv-cache-dtype fp8"),
]

# What a bar says meanwhile.
ASKING_VLLM: Final = "asking vLLM, which takes some seconds"
# What was asked was done, and something is wrong with what was looked at.
STATUS_WRONG: Final = 3

_to_terminal = False
_columns: int | None = None

# As a shell tells of one that SIGPIPE ended.
STATUS_UNREAD: Final = 141

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SHORT_DIGITS: Final = 12
_MAX_WIDTH: Final = 10_000
_SHOW_EVERY_S: Final = 0.1
_TIMES: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))


def to_terminal(*, is_one: bool, columns: int | None) -> None:
    """What this process prints is handed on by another one. `is_one`: its standard error is a
    terminal."""
    global _to_terminal, _columns
    _to_terminal, _columns = is_one, columns


def say(line: str = "", *, is_error: bool = False) -> None:
    """Prints one line. Raises typer.Exit, as `print_json` and `print_table`, if nobody reads it any
    more, as behind `| head`."""
    stream = sys.stderr if is_error else sys.stdout
    try:
        stream.write(line + "\n" if line.isprintable() else printable(line) + "\n")
        stream.flush()
    except BrokenPipeError:
        # What is left in its buffer is written when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise typer.Exit(STATUS_UNREAD) from None


def printable(text: str) -> str:
    """Control and format characters, ends of lines and broken Unicode as their escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def print_json(value: object) -> None:
    """One line."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value))  # a file's name may be no text
    if not text.isprintable():
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    say(text)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """Columns named in `right` are numbers. Nothing is cut off, whatever the terminal's width."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            *(f"{cell:,}" if isinstance(cell, int) else printable(str(cell)) for cell in row)
        )
    width = max(_console(_MAX_WIDTH).measure(table).maximum, _console(_columns).width)
    console = _console(width)
    with console.capture() as shown:
        console.print(table)
    for line in shown.get().splitlines():
        say(line.rstrip())


def _console(width: int | None) -> Console:
    return Console(markup=False, highlight=False, emoji=False, width=width)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what is told `(done, total)`. Shown on standard error, if that is a terminal."""
    shown_s = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        is_due = now_s - shown_s > _SHOW_EVERY_S
        shown_s = now_s if is_due else shown_s
        bar.update(task, completed=done, total=total, refresh=is_due)

    is_shown = _to_terminal or sys.stderr.isatty()
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=_to_terminal or None, width=_columns),
        transient=True,
        disable=not is_shown,
        # A thread that draws would look like one that gets on.
        auto_refresh=not _to_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield on_progress


def short(digest: str) -> str:
    """The beginning of a name in hex, enough for people to tell it from others."""
    return digest[:_SHORT_DIGITS]


def size(nbytes: float) -> str:
    """In the largest unit of which it has one."""
    for unit in _UNITS:
        if nbytes < 1024 or unit == _UNITS[-1]:
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def ago(since_s: float) -> str:
    """How long a time of the past (seconds since 1970) is ago."""
    age_s = max(0.0, time.time() - since_s)
    unit_s, unit = next((each for each in _TIMES if age_s >= each[0]), _TIMES[-1])
    return f"{age_s / unit_s:.0f} {unit}"


def count(number: int, one: str, many: str = "") -> str:
    """Like "1 page" or "1,234 pages"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
