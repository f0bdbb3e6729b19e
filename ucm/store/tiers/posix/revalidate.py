"""Is a name there now? Past what this machine remembers of names that were not.

Clients of shared filesystems remember for a while, NFS up to a minute, that a name was missing. Two
things make them look again. A directory that is opened is asked for anew by NFS, so a listing comes
first; what it lists decides nothing, since other clients remember listings (sshfs for 20 seconds).
And a name that is to be made is looked up where it is kept.

NFS believes in an absence as long as the directory's time of change stays what it was. A file that
appears within one tick of the server's clock after somebody looked for it leaves that time as it
is. Its writer moves that a moment later (retouch.py); where no writer has, `doubt` does.
"""

from __future__ import annotations

import contextlib
import os

# A directory that was made in the tick of a look is as invisible as a file is.
_DOUBTED_DIRECTORIES = 3


def is_there_now(path: str, *, below: str) -> bool:
    """`path` lies somewhere below the directory `below`. Raises OSError when the filesystem can't
    tell."""
    directory = os.path.dirname(path)
    if not _is_listed(directory):
        if len(directory) <= len(below) or not is_there_now(directory, below=below):
            return False
        _is_listed(directory)
    return _is_seen(path)


def doubt(path: str, *, below: str) -> None:
    """Gives the deepest directories above `path` that are there for this machine another time of
    change, so that every client gives up what it remembers as missing in them. `below` is never
    touched. Where this machine may not do that, nothing happens: the next change by somebody else
    does the same."""
    directory = os.path.dirname(path)
    left = _DOUBTED_DIRECTORIES
    while left and len(directory) > len(below):
        with contextlib.suppress(OSError):
            os.utime(directory)
            left -= 1
        directory = os.path.dirname(directory)


def _is_listed(directory: str) -> bool:
    """Opens and reads a directory, for what that does to the client. False if it isn't there."""
    try:
        with os.scandir(directory) as entries:
            next(entries, None)
    except FileNotFoundError:
        return False
    return True


def _is_seen(path: str) -> bool:
    """Whether a name can be opened."""
    if os.path.lexists(path):
        return True
    # The kernel still remembers that it was missing. It asks again about a name that is to be made;
    # this one is to be a second name of its own directory, which every kernel refuses.
    with contextlib.suppress(OSError):
        os.link(os.path.dirname(path), path)
    return os.path.lexists(path)
