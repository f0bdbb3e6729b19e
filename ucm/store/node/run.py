"""Running a node cache: in the foreground, or as what an engine has started."""

from __future__ import annotations

import logging
import os
from typing import Final

import msgspec

from ucm.config.settings import StoreSettings
from ucm.store.node import server
from ucm.store.node.lock import SocketLock, take_lock
from ucm.store.node.trusted_users import trust_of

logger = logging.getLogger(__name__)

_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run_by_hand(settings: StoreSettings) -> None:
    """`ucm node-cache`: serves in the foreground, logging to stderr. Raises as `server.run`."""
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    lock = take_lock(settings.socket_path, trust_of(settings))
    server.run(settings, lock)


def run_detached(settings_json: str, lock_fd: int) -> None:
    """Runs in the process that is to become the node cache."""
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    # Engines bind their processes to cores; the node cache works for all of them.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        settings = msgspec.json.decode(settings_json, type=StoreSettings)
        lock = SocketLock.adopt(settings.socket_path, lock_fd, trust_of(settings))
        server.run(settings, lock)
    except Exception:
        logger.exception("the node cache failed")
        raise
    finally:
        # Threads in a hung read or write can't be joined.
        logging.shutdown()
        os._exit(0)
