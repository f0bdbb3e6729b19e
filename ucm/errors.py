"""The error tree. Everything that UCM raises on purpose is one of these.

    UcmError
    ├── ConfigError        a setting is wrong; the start stops
    ├── UnsupportedEngine  this engine can't be served correctly; the start stops
    ├── ProtocolError      the peer on the node cache's socket speaks nonsense; the connection ends
    ├── NodeUnavailable    no node cache to talk to; blocks are absent until there is one
    ├── TierError          storage failed; the block is absent
    └── TaskFailed         a load or dump of the store API did not do what was asked

The first two are for people and stop the start. The next three never reach a request: whoever
catches them counts them, and the engine recomputes. The last is for users of the store API, who
decide for themselves. Foreign errors (OSError, YAMLError, ...) are
translated once, where they come in, and chained with `from`.
"""

from __future__ import annotations

from ucm.outcome import Outcome


class UcmError(Exception):
    """The root: catch this one at a door."""


class ConfigError(UcmError):
    """A setting is wrong. One line: which file, which key, what is wrong, what to write instead."""


class UnsupportedEngine(UcmError):
    """The engine can't be served correctly. One sentence that says why."""


class ProtocolError(UcmError):
    """The peer on the node cache's socket speaks nonsense, or another version of the protocol."""


class NodeUnavailable(UcmError):
    """The node cache can't be reached, or did not start in time."""


class TaskFailed(UcmError):
    """A task of the store API ended without doing what was asked. Says which block, and why."""


class TierError(UcmError):
    """Storage failed. The message names the file and the error; `reason` is for counters."""

    def __init__(self, message: str, *, reason: Outcome) -> None:
        super().__init__(message)
        self.reason: Outcome = reason
