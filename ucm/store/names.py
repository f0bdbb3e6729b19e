"""Is a name there now? Past what this machine remembers of names that were not.

Clients of shared filesystems remember for a while, NFS up to a minute, that a name was missing. A
directory's listing is asked for anew when the directory is opened, so it comes first: a name that
was never looked up was never remembered as missing.
"""

from __future__ import annotations

import contextlib
import os


def is_there_now(path: str, *, below: str) -> bool:
    """`path` lies somewhere below the directory `below`. Raises OSError when the filesystem can't
    tell."""
    directory, name = os.path.split(path)
    listed = _names(directory, below=below)
    return listed is not None and name in listed and _is_seen(path)


def _names(directory: str, *, below: str) -> set[str] | None:
    """None if there is no such directory."""
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        if len(directory) <= len(below) or not is_there_now(directory, below=below):
            return None
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return None


def _is_seen(path: str) -> bool:
    """Whether a name that is listed can be opened."""
    if os.path.lexists(path):
        return True
    # The kernel still remembers that it was missing. It asks again about a name that is to be made;
    # this one is to be a second name of its own directory, which every kernel refuses.
    with contextlib.suppress(OSError):
        os.link(os.path.dirname(path), path)
    return os.path.lexists(path)
