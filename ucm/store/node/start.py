"""Finding the node cache of this machine, and starting it if there is none.

Anybody may start one at any time: the lock beside the socket lets only one of them serve, the
others end at once.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from ucm.config import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.node import server
from ucm.store.node.client import NodeClient
from ucm.store.node.place import ensure_private_directory

logger = logging.getLogger(__name__)

_RETRY_S = 0.02
_START_AGAIN_S = 2.0
_HANDSHAKE_S = 5.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def connect_or_start(
    settings: StoreSettings,
    *,
    session: str,
    role: str,
    timeout_s: float,
    given_up: threading.Event | None = None,
) -> NodeClient:
    """A connection to the node cache at `settings.socket_path`, which is started when nobody
    answers. Blocks up to `timeout_s`, or until `given_up` is set; raises NodeUnavailable with where
    to look, or ConfigError for a socket directory that somebody else controls."""
    given_up = given_up or threading.Event()
    ensure_private_directory(settings.socket_path)
    deadline_s = time.monotonic() + timeout_s
    started_s = -math.inf
    while True:
        try:
            return NodeClient.connect(
                settings.socket_path, session=session, role=role, timeout_s=_HANDSHAKE_S
            )
        except NodeUnavailable as error:
            if given_up.is_set() or time.monotonic() >= deadline_s:
                raise NodeUnavailable(
                    f"{error}; see {log_path(settings)} for why it did not start"
                ) from error
        # Again after a while: the one that was started may have found another that was leaving.
        if time.monotonic() - started_s > _START_AGAIN_S:
            spawn(settings)
            started_s = time.monotonic()
        given_up.wait(_RETRY_S)


def spawn(settings: StoreSettings) -> None:
    """Starts a node cache that outlives this process. It ends at once if one serves already."""
    ensure_private_directory(settings.socket_path)
    with open(log_path(settings), "ab") as log:
        # The child forks again and its parent ends, so the node cache isn't ours: an engine that
        # ends its process tree doesn't take the unwritten pages with it.
        subprocess.run(
            [sys.executable, "-m", "ucm.store.node", msgspec.json.encode(settings).decode()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # `-m` looks for `ucm` in the working directory first: the one that this process uses.
            cwd=Path(__file__).resolve().parents[3],
            check=False,
        )


def log_path(settings: StoreSettings) -> str:
    """Where an automatically started node cache logs."""
    return f"{settings.socket_path}.log"


def run_by_hand(settings: StoreSettings) -> None:
    """`ucm node-cache`: serves in the foreground, logging to stderr. Raises as `server.run`."""
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    server.run(settings)


def run_detached(settings_json: str) -> None:
    """What `spawn` runs, in the process that is to become the node cache."""
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    # Engines bind their processes to cores; the node cache works for all of them.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        server.run(msgspec.json.decode(settings_json, type=StoreSettings))
    except NodeUnavailable as error:
        logger.info("not needed: %s", error)
    except Exception:
        logger.exception("the node cache failed")
        raise
    finally:
        # Threads in a hung read or write can't be joined.
        logging.shutdown()
        os._exit(0)
