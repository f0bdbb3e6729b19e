"""Instances in a YAML file, read anew when it changes.

prefill:
  - http://10.0.0.1:7800
decode:
  - http://10.0.0.2:7801
worker: []          # for a proxy in mixed mode, instead of the other two
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping

from yarl import URL

from ucm.config import read_yaml
from ucm.errors import ConfigError
from ucm.pd.flags import instance_url
from ucm.pd.instance import Role

logger = logging.getLogger(__name__)

Listed = Mapping[Role, tuple[URL, ...]]


def read_instances(path: str) -> Listed:
    """Raises ConfigError with the file, the place in it and what is wrong."""
    tree = read_yaml(path)
    roles = {role.value: role for role in Role}
    if not isinstance(tree, dict) or not set(tree) <= set(roles):
        names = ", ".join(roles)
        raise ConfigError(f"{path}: expected lists of URLs under some of: {names}")
    found: dict[Role, tuple[URL, ...]] = {}
    for name, urls in tree.items():
        if not isinstance(urls, list):
            raise ConfigError(f"{path}: {name}: expected a list of URLs")
        try:
            found[roles[name]] = tuple(dict.fromkeys(instance_url(str(url)) for url in urls))
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
    return found


async def follow_file(path: str, on_change: Callable[[Listed], None], *, interval_s: float) -> None:
    """Calls `on_change` with what is in the file, at first and after each change. A file that is
    gone or wrong changes nothing, and is said once. Runs until it is cancelled."""
    seen: object = None
    while True:
        now = await asyncio.to_thread(_stamp, path)
        if now != seen:
            seen = now
            try:
                on_change(await asyncio.to_thread(read_instances, path))
            except ConfigError as error:
                logger.warning("the instances stay as they are: %s", error)
        await asyncio.sleep(interval_s)


def _stamp(path: str) -> object:
    """Differs when the file does."""
    try:
        stat = os.stat(path)
    except OSError as error:
        return error.errno
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
