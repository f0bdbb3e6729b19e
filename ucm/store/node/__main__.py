"""`python -m ucm.store.node SETTINGS_JSON`: a detached node cache (see start.spawn)."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.setsid()

    from ucm.store.node.start import run_detached

    # Stay in nobody's directory: it may be a mount that someone wants to take away.
    os.chdir("/")
    run_detached(sys.argv[1])
