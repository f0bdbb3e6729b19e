"""Files with keys and passwords that others may read or change.

That is said and not refused: a volume of Kubernetes' gives all its files to everybody, and there
may be nobody else in the container.
"""

from __future__ import annotations

import logging
import os
import stat

logger = logging.getLogger(__name__)

# Whoever is in the group is meant to read it.
_FOR_OTHERS = 0o077 & ~stat.S_IRGRP
_said: set[str] = set()


def judge(path: str, *, flag: str) -> None:
    """Says it once for each file in this process. One that can't be looked at is its reader's
    business; what is no file has no readers."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and mode & _FOR_OTHERS and path not in _said:
        _said.add(path)
        logger.warning("%s: %s: others may read or change it: chmod 600 it", flag, path)
