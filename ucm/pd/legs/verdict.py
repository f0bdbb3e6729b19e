"""What an answer's status says about the instance that gave it. Pure.

    GOOD     it does its work
    NO_WORD  the request is wrong, or it is about something else: nothing about the instance
    BUSY     it is well and has no room; another may have
    DOUBTED  it lacks what the client asks for: the client's mistake, unless another one has it
    FAILED   it can't do its work

Of the last three another instance is asked before the client hears anything. What it answers
decides between the client and the instance.
"""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    GOOD = "good"
    NO_WORD = "no_word"
    BUSY = "busy"
    DOUBTED = "doubted"
    FAILED = "failed"

    @property
    def is_settled(self) -> bool:
        """Nobody else has to be asked."""
        return self in (Verdict.GOOD, Verdict.NO_WORD)


_BUSY = frozenset({429, 503})
# The wrong key, model or path.
_DOUBTED = frozenset({401, 404})
# About the method or the protocol.
_NO_WORD = frozenset({501, 505})
# Asking twice might do something twice.
_ASKED_ONCE = frozenset({"PUT", "PATCH", "DELETE"})


def of_status(status: int, *, method: str = "POST") -> Verdict:
    if status in _BUSY:
        return Verdict.BUSY
    if status in _DOUBTED:
        return Verdict.DOUBTED
    if status >= 500 and status not in _NO_WORD:
        return Verdict.FAILED
    # A GET says no more than a health check: that somebody listens.
    return Verdict.GOOD if status < 400 and method == "POST" else Verdict.NO_WORD


def may_ask_another(method: str) -> bool:
    return method not in _ASKED_ONCE
