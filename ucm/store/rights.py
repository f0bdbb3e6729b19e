"""Who else may write into a backend, and whether this process may: said once, when it is opened."""

from __future__ import annotations

import logging
import os
import stat

_logger = logging.getLogger(__name__)


def problems(mode: int, *, may_write: bool, uid: int, is_sealed: bool) -> list[str]:
    """What a person should know of a directory with these rights. Pure."""
    found = []
    if not may_write:
        found.append(
            f"uid {uid} may not write here: pages of this node stay in its memory, and what others "
            f"have stored is read; give it the right, or run all nodes as one user"
        )
    if mode & stat.S_IWOTH and not is_sealed:
        found.append(
            "anybody may write here, and so could forge pages: chmod o-w it, or set page_key_file "
            "(docs/security.md)"
        )
    return found


def say_problems(path: str, *, is_sealed: bool) -> None:
    """Logs them. Raises OSError."""
    mode = os.stat(path).st_mode
    may_write = os.access(
        path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    )
    for problem in problems(mode, may_write=may_write, uid=os.geteuid(), is_sealed=is_sealed):
        _logger.warning("%s: %s", path, problem)
