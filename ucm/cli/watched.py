"""Runs a subcommand that looks at files so that it ends although storage hangs.

A process with a thread in a hung mount can't end, and neither can whoever waits for it or for what
it prints. So the work is done in a child of its own, and this process, which touches no storage,
hands on what that prints, and leaves it alone when nothing gets on any more. There is no bound on
the whole: what takes long and gets on is waited for.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from ucm.cli import printing
from ucm.cli.ending import end

if TYPE_CHECKING:
    from ucm.store.inspect.signs_of_life import SignsOfLife

# How long nothing may get on.
SILENCE_S: Final = 60.0
TimeoutS = Annotated[
    float,
    typer.Option(
        "--timeout-s",
        min=1,
        max=86_400,
        help="give storage up that answers nothing for so long; what gets on may take any time",
    ),
]

_LOOK_S: Final = 0.25
# What is interrupted may have to clear up.
_CLEAR_UP_S: Final = 12.0
_STATUS_INTERRUPTED: Final = 130
_CHUNK_BYTES: Final = 1 << 16
_NO_BAR: Final = b"\r\x1b[2K\x1b[?25h"
_PR_SET_PDEATHSIG: Final = 1


def watched(command: str, place: str, timeout_s: float, act: Callable[[], None]) -> None:
    """Does `act`, which prints and raises typer.Exit as it would here. Raises typer.Exit if it
    ends otherwise than well, or if nothing has got on for `timeout_s`. `place` is what the command
    was given to look at. To be called while no other thread runs."""
    from ucm.store.inspect.signs_of_life import SignsOfLife

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    width, shows_bars = _columns(), sys.stderr.isatty()
    signs = SignsOfLife()
    (out, out_end), (err, err_end), (status, status_end) = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        printing.to_terminal(is_one=shows_bars, columns=width)
        _child(act, signs, (out_end, err_end, status_end))
    for fd in (out_end, err_end, status_end):
        os.close(fd)
    # Who ends this process ends the child as well, which then clears up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Bars before what follows them.
    prints = _Prints(command, {err: 2, out: 1}, pid, signs)
    try:
        if not prints.run(timeout_s):
            prints.clear_up(has_bars=shows_bars)
            end(_hung(command, signs.where or place, timeout_s))
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGINT)
        if not prints.run(_CLEAR_UP_S):
            prints.clear_up(has_bars=shows_bars)
        raise
    _exit_as(status)


def _exit_as(status: int) -> None:
    """Raises typer.Exit unless the child has ended well. It says so before it ends."""
    said = os.read(status, 1)
    code = said[0] if said else 1
    if not said:
        printing.say("the process that looks at storage has ended without a word", is_error=True)
    if code:
        raise typer.Exit(code)


def _hung(command: str, where: str, timeout_s: float) -> str:
    """For people."""
    return (
        f"{command}: {where}: storage doesn't answer: for {timeout_s:g} s nothing has come back "
        f"(--timeout-s waits longer): look at the mount and its server; ucm doctor tries it out"
    )


def _columns() -> int | None:
    """The terminal's width, which a child without one can't ask for."""
    with suppress(OSError):
        return os.get_terminal_size(1).columns
    return None


class _Prints:
    """Hands on what the child `pid` prints. `to`: by the end of a pipe, this process's own
    descriptor."""

    def __init__(self, command: str, to: dict[int, int], pid: int, signs: SignsOfLife) -> None:
        self._command = command
        self._to = to
        self._pid = pid
        self._signs = signs

    def run(self, timeout_s: float) -> bool:
        """Until the child has nothing more to print. False if it hangs; it is ended then, as far
        as it can be."""
        number, since_s = self._signs.number(self._pid), time.monotonic()
        while self._to:
            for pipe in select.select([*self._to], [], [], _LOOK_S)[0]:
                self._hand_on(pipe)
                # Who reads it may take any time.
                since_s = time.monotonic()
            now = self._signs.number(self._pid)
            if now != number or self._signs.is_bounded:
                number, since_s = now, time.monotonic()
            if time.monotonic() - since_s > timeout_s:
                self._kill()
                return False
        return True

    def _hand_on(self, pipe: int) -> None:
        text = os.read(pipe, _CHUNK_BYTES)
        if not text:
            del self._to[pipe]
            os.close(pipe)
        try:
            while text:
                text = text[os.write(self._to[pipe], text) :]
        except BrokenPipeError:
            self._kill()
            raise typer.Exit(printing.STATUS_UNREAD) from None
        except OSError as error:
            self._kill()
            end(f"{self._command}: what it prints can't be written: {error.strerror}")

    def clear_up(self, *, has_bars: bool) -> None:
        """What the child would have done at its end: a bar hides the cursor, and its line is
        begun."""
        if has_bars:
            with suppress(OSError):
                os.write(2, _NO_BAR)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


def _child(act: Callable[[], None], signs: SignsOfLife, ends: tuple[int, int, int]) -> NoReturn:
    code = 1
    try:
        # A terminal's Ctrl-C goes to the parent, which hands it on once.
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out_end, err_end, status_end = ends
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, of in ((nothing, 0), (out_end, 1), (err_end, 2)):
            os.dup2(fd, of)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
        signs.watch_this_process()
        code = _code_of(act)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(status_end, bytes([code]))
    finally:
        os._exit(code)


def _code_of(act: Callable[[], None]) -> int:
    try:
        act()
    except typer.Exit as error:
        return error.exit_code
    except KeyboardInterrupt:
        return _STATUS_INTERRUPTED
    except BaseException:  # noqa: BLE001 it is told, as Python would
        traceback.print_exc()
        return 1
    return 0
