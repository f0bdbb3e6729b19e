"""What a client makes of the settings that the node cache it has met runs with. No I/O.

A node cache is found by its socket, and a socket's name may be given to anything. Who wants other
pages goes away; who only wants other knobs is told which of them have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ucm.config.s3_settings import s3_places
from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.store.node.protocol import Welcome

_GIB = 1 << 30
_WHOSE_PAGES = ("store_pipeline", "storage_backends")
# Where it is found, and who starts it, are the client's own.
_NOT_COMPARED = {*_WHOSE_PAGES, "node_cache_socket", "node_cache_autostart"}


def check_pages(mine: StoreSettings, welcome: Welcome) -> None:
    """Raises ConfigError when the node cache keeps other pages than `mine` asks for."""
    theirs = _as_served(welcome)
    wanted, served = _pages(msgspec.to_builtins(mine)), _pages(theirs)
    if wanted != served:
        raise ConfigError(
            f"node_cache_socket: the node cache at {mine.socket_path} (pid {welcome.pid}) serves "
            f"{served}, and this process wants {wanted}: give one of them another "
            f"node_cache_socket, or stop that node cache"
        )


def ignored_settings(mine: StoreSettings, welcome: Welcome) -> str:
    """Settings of `mine` that have no effect because the node cache was started with others; empty
    where there are none."""
    wanted, served = msgspec.to_builtins(mine), _as_served(welcome)
    differing = sorted(
        name
        for name in wanted.keys() & served.keys() - _NOT_COMPARED
        if wanted[name] != served[name]
    )
    return ", ".join(
        f"{_name(name)} {_show(name, wanted[name])} (it has {_show(name, served[name])})"
        for name in differing
    )


def _as_served(welcome: Welcome) -> Mapping[str, object]:
    return dict(welcome.settings)


def _pages(settings: Mapping[str, object]) -> str:
    pipeline, backends = (_listed(settings.get(name)) for name in _WHOSE_PAGES)
    places = [*map(str, backends), *s3_places(settings, tuple(map(str, pipeline)))]
    where = f" in {':'.join(places)}" if places else ""
    return f"{'|'.join(map(str, pipeline))}{where}"


def _listed(value: object) -> Sequence[object]:
    """Another version may spell it otherwise, and is then another one, not a defect here."""
    return value if isinstance(value, (list, tuple)) else [value] if value else []


def _name(field: str) -> str:
    return "cache_buffer_capacity_gb" if field == "cache_capacity_bytes" else field


def _show(field: str, value: object) -> str:
    if field == "cache_capacity_bytes" and isinstance(value, int):
        return f"{value / _GIB:.4g}" if value else "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
