"""Finding the node cache of this machine, and starting it if there is none.

Who starts one takes the lock beside the socket first, and hands it to the process that it starts.
Who can't have the lock waits: somebody serves, starts or leaves. `docs/node-cache.md` has the
rules.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.client.connection import NodeClient
from ucm.store.client.greeting import check_pages, ignored_settings
from ucm.store.node.limits import memory_left, room_for
from ucm.store.node.lock import Holder, SocketLock, try_lock, why_held_up
from ucm.store.node.rendezvous import ensure_private_directory, open_own_file
from ucm.store.node.trusted_users import trust_of
from ucm.store.tiers.build import build_tiers

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.02
_LAST_PAUSE_S: Final = 1.0
_FIRST_HANDSHAKE_S: Final = 5.0
_LAST_HANDSHAKE_S: Final = 30.0
_LAST_RESTART_S: Final = 60.0
_LAST_DOUBLING: Final = 6
# Per socket, of which node cache this process has said which settings it ignores.
_said: dict[str, tuple[str, str]] = {}
# The others wait for theirs: of 72 clients of a node, 64 are ranks.
_STARTERS: Final = ("scheduler", "store", "tool")


def connect_or_start(
    settings: StoreSettings,
    *,
    session: str,
    role: str,
    timeout_s: float,
    given_up: threading.Event | None = None,
) -> NodeClient:
    """A connection to the node cache at `settings.socket_path`, which is started when nobody
    answers, unless it is a service's to start. Blocks up to `timeout_s`, or until `given_up` is
    set; raises NodeUnavailable with where to look, or ConfigError for a place that somebody else
    controls, or that serves other pages, and for settings that no node cache can start with."""
    given_up = given_up or threading.Event()
    trust = trust_of(settings)
    ensure_private_directory(settings.socket_path, trust)
    deadline_s = time.monotonic() + timeout_s
    pause_s, handshake_s = _FIRST_PAUSE_S, _FIRST_HANDSHAKE_S
    while True:
        try:
            client = NodeClient.connect(
                settings.socket_path,
                session=session,
                role=role,
                timeout_s=handshake_s,
                trust=trust,
            )
        except NodeUnavailable as error:
            if given_up.is_set() or time.monotonic() >= deadline_s:
                if error.__cause__ is None:
                    raise  # it has answered, and said why not
                raise _unavailable(settings, error) from error
            if isinstance(error.__cause__, TimeoutError):
                # Somebody listens, on a machine that has too much to do.
                handshake_s = min(handshake_s * 2, _LAST_HANDSHAKE_S)
        else:
            _accept(settings, client, role)
            return client
        if role in _STARTERS and settings.autostart:
            spawn(settings)
        given_up.wait(pause_s * random.uniform(0.5, 1.5))
        pause_s = min(pause_s * 1.5, _LAST_PAUSE_S)


def _unavailable(settings: StoreSettings, error: NodeUnavailable) -> NodeUnavailable:
    why = why_held_up(settings.socket_path)
    if not settings.autostart:
        said = f"{error}: {why}" if why else str(error)
        return NodeUnavailable(
            f"{said}; `ucm node-cache` is to run there (node_cache_autostart: false)"
        )
    log = log_path(settings)
    return NodeUnavailable(
        f"{error}: {why}; its log: {log}" if why else f"{error}; see {log} for why it did not start"
    )


def _accept(settings: StoreSettings, client: NodeClient, role: str) -> None:
    """Closes `client` and raises ConfigError when it leads to other pages."""
    try:
        check_pages(settings, client.welcome)
    except BaseException:
        client.close()
        raise
    ignored = ignored_settings(settings, client.welcome)
    about = (client.welcome.arena, ignored)
    if ignored and role in _STARTERS and _said.get(settings.socket_path) != about:
        _said[settings.socket_path] = about
        logger.warning(
            "the node cache (pid %d) was started with other settings, so these have no effect "
            "here until it has left: %s",
            client.welcome.pid,
            ignored,
        )


def spawn(settings: StoreSettings) -> bool:
    """Starts a node cache that outlives this process, unless somebody serves or starts already, or
    the last ones have failed to start a moment ago. Raises ConfigError for settings that would end
    it at once: its own log is read by fewer people than the one of who starts it."""
    lock = try_lock(settings.socket_path, trust_of(settings))
    if lock is None:
        return False
    try:
        check_settings(settings)
    except BaseException:
        lock.release()
        raise
    holder = lock.holder
    now_s = time.time()
    if not may_start(holder, now_s=now_s):
        lock.release()
        return False
    lock.note(Holder(tried_s=now_s, failures=holder.failures + 1))
    try:
        _spawn(settings, lock)
    finally:
        lock.handed_over()
    return True


def check_settings(settings: StoreSettings) -> None:
    """Raises ConfigError for what only a node cache needs, and can't start with on this machine."""
    build_tiers(settings)
    room_for(settings.cache_capacity_bytes, memory_left())


def may_start(holder: Holder, *, now_s: float) -> bool:
    """A node cache that dies before it serves is tried again ever more seldom."""
    if not holder.failures:
        return True
    pause_s = min(2.0 ** min(holder.failures, _LAST_DOUBLING), _LAST_RESTART_S)
    return not holder.tried_s <= now_s < holder.tried_s + pause_s


def _spawn(settings: StoreSettings, lock: SocketLock) -> None:
    log_fd = open_own_file(log_path(settings), os.O_WRONLY | os.O_APPEND, trust_of(settings))
    with open(log_fd, "ab") as log:
        # The child forks again and its parent ends, so the node cache isn't ours: an engine that
        # ends its process tree doesn't take the unwritten pages with it.
        subprocess.run(
            [
                *(sys.executable, "-m", "ucm.store.node"),
                msgspec.json.encode(settings).decode(),
                str(lock.fd),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fd],
            # `-m` looks for `ucm` in the working directory first: the one that this process uses.
            cwd=Path(__file__).resolve().parents[3],
            check=False,
        )


def log_path(settings: StoreSettings) -> str:
    """Where an automatically started node cache logs."""
    return f"{settings.socket_path}.log"
