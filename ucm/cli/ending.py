"""How a subcommand ends that can't do what it was asked: one line on stderr, and status 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ucm.cli.printing import say
from ucm.errors import UcmError


@contextmanager
def one_line_for_errors(command: str) -> Iterator[None]:
    """Around whatever may raise UcmError."""
    try:
        yield
    except UcmError as error:
        end(f"{command}: {error}")


def end(problem: str) -> NoReturn:
    """Prints `problem`. Raises typer.Exit, without what led to it."""
    say(problem, is_error=True)
    raise typer.Exit(1) from None
