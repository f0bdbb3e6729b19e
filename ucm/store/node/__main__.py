"""`python -m ucm.store.node SETTINGS_JSON LOCK_FD`: a detached node cache (see client/start.py)."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    # Out of reach of what ends its starter: Ctrl-C, a terminal that closes, a group that is killed.
    # But in its starter's session: Linux shares cores between sessions first (autogroups), and in
    # another one than engines that compute and spin it was seen to wait for seconds until it ran.
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from ucm.store.node.run import run_detached

    # Stay in nobody's directory: it may be a mount that someone wants to take away.
    os.chdir("/")
    run_detached(sys.argv[1], int(sys.argv[2]))
