"""Finding the node cache of this machine, and starting it if there is none.

Anybody may start one at any time: the lock beside the socket lets only one of them serve, the
others end at once.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from ucm.config import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.node import server
from ucm.store.node.client import NodeClient

logger = logging.getLogger(__name__)

_RETRY_S = 0.02
_HANDSHAKE_S = 5.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def connect_or_start(
    settings: StoreSettings, *, session: str, role: str, timeout_s: float
) -> NodeClient:
    """A connection to the node cache at `settings.socket_path`, which is started when nobody
    answers. Blocks up to `timeout_s`; raises NodeUnavailable with where to look."""
    deadline_s = time.monotonic() + timeout_s
    started = False
    while True:
        try:
            return NodeClient.connect(
                settings.socket_path, session=session, role=role, timeout_s=_HANDSHAKE_S
            )
        except NodeUnavailable as error:
            if time.monotonic() >= deadline_s:
                raise NodeUnavailable(
                    f"{error}; see {log_path(settings)} for why it did not start"
                ) from error
        if not started:
            spawn(settings)
            started = True
        time.sleep(_RETRY_S)


def spawn(settings: StoreSettings) -> None:
    """Starts a node cache that outlives this process. It ends at once if one serves already."""
    Path(settings.socket_path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(log_path(settings), "ab") as log:
        # The child forks again and its parent ends, so the node cache isn't ours: an engine that
        # ends its process tree doesn't take the unwritten pages with it.
        subprocess.run(
            [sys.executable, "-m", "ucm.store.node", msgspec.json.encode(settings).decode()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
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
