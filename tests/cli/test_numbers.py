"""No number that a command takes is without bounds, and what is beyond them is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

from ucm.cli.main import app


def numbers() -> Iterator[tuple[str, OptionInfo]]:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or ""
        hints: dict[str, Any] = get_type_hints(command.callback, include_extras=True)
        for parameter in inspect.signature(command.callback).parameters:
            kind, *infos = get_args(hints[parameter]) or (hints[parameter],)
            if {int, float} & {kind, *get_args(kind)}:
                yield name, next(info for info in infos if isinstance(info, OptionInfo))


# In an annotation the name comes first, where a default value would stand.
OPTIONS = [
    pytest.param(name, option.default, option, id=f"{name} {option.default}")
    for name, option in numbers()
]


@pytest.mark.parametrize(("command", "flag", "option"), OPTIONS)
def test_a_number_has_bounds_and_beyond_them_is_an_error(
    command: str, flag: str, option: OptionInfo
) -> None:
    assert option.min is not None and option.max is not None
    for value in ("inf", "nan", "-inf", "1e300", "9" * 400, option.max * 2, option.min - 1):
        done = CliRunner().invoke(app, [command, "/nowhere", f"{flag}={value}"])
        assert done.exit_code == 2, f"{value}: {done.output}"
        assert flag in done.output


def test_there_are_commands_that_take_numbers() -> None:
    assert {name for name, _ in numbers()} == {
        *("ls", "du", "inspect", "reclaim", "stat", "verify", "bench", "doctor", "warm"),
    }
