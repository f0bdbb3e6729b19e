"""Files that are read anew while the proxy serves, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TypeVar

from ucm.errors import ConfigError

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0

_Read = TypeVar("_Read")


def stamp(paths: Sequence[str]) -> object:
    """Differs when one of the files does."""
    return tuple(map(_stamp, paths))


def start(following: Iterable[Coroutine[None, None, None]]) -> list[asyncio.Task[None]]:
    """Tasks in the background, to be cancelled when the proxy ends. One that fails is a defect."""
    tasks = [asyncio.create_task(each) for each in following]
    for task in tasks:
        task.add_done_callback(_log_failure)
    return tasks


async def follow(
    paths: Sequence[str],
    read: Callable[[], _Read],
    on_change: Callable[[_Read], None],
    *,
    what: str,
    seen: object = None,
    interval_s: float = INTERVAL_S,
) -> None:
    """Calls `on_change` with what `read` gives, at first if `seen` is not the files' stamp, and
    after each change. Files that are gone or wrong, a ConfigError of `read`, change nothing, and
    that is said once. Runs until it is cancelled."""
    while True:
        now = await asyncio.to_thread(stamp, paths)
        if now != seen:
            seen = now
            try:
                on_change(await asyncio.to_thread(read))
            except ConfigError as error:
                logger.warning("the %s stay as they are: %s", what, error)
        await asyncio.sleep(interval_s)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task of the proxy has failed", exc_info=error)


def _stamp(path: str) -> object:
    try:
        stat = os.stat(path)
    except OSError as error:
        return error.errno
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
