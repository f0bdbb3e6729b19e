"""Which event loop the proxy runs on: Python's own, or uvloop, which is a package of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from ucm.errors import ConfigError


def run(main: Coroutine[Any, Any, None], *, loop: str) -> None:
    """Raises ConfigError when that loop is not installed."""
    if loop == "asyncio":
        asyncio.run(main)
        return
    try:
        import uvloop
    except ModuleNotFoundError:
        main.close()
        problem = "--loop uvloop needs the package uvloop: pip install 'ucm[uvloop]'"
        raise ConfigError(problem) from None
    uvloop.run(main)
