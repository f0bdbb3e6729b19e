"""The epoch in a file of its own, which is read again at run time."""

from __future__ import annotations

from typing import Final

from ucm.config.convert import show
from ucm.errors import ConfigError

# From here on an epoch is one engine's own, made up at a reset: nobody else has it, or ever will.
PRIVATE_EPOCH: Final = 1 << 62


def read_epoch(path: str) -> int:
    """The number in an epoch_file. Raises ConfigError."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(64).strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"epoch_file {path}: can't be read: {error}") from error
    if not text.isdigit() or int(text) >= PRIVATE_EPOCH:
        raise ConfigError(
            f"epoch_file {path}: expected a whole number >= 0 and < {PRIVATE_EPOCH},"
            f" got {show(text)}"
        )
    return int(text)
