"""How much an answer says, for what may stand behind its prompt in the next turn's.

Counted is what a client can say again: texts, thoughts and calls of tools. Where a chunk of a
stream or an answer can't be read it says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ucm.pd.legs.rewrite import BYTES_PER_TOKEN, NO_TEXT

_DATA: Final = b"data:"


class _SaidChoice(msgspec.Struct):
    text: Any = None
    message: Any = None
    delta: Any = None
    token_ids: list[int] | None = None


class _SaidAnswer(msgspec.Struct):
    """Or a part of one: of completions and chats; of messages and responses, streamed and whole."""

    choices: list[_SaidChoice] = []
    delta: Any = None
    content_block: Any = None
    content: Any = None
    output: Any = None


_decoder = msgspec.json.Decoder(_SaidAnswer)


class Said:
    """By one answer."""

    def __init__(self) -> None:
        self._chars = 0
        self.ids: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """A guess, as that of the same text in a prompt."""
        return self._chars // BYTES_PER_TOKEN

    def read_whole(self, body: bytes) -> None:
        answer = _read(body)
        self._add(answer)
        if len(answer.choices) == 1:
            self.ids = answer.choices[0].token_ids or ()

    def read_events(self, events: bytes) -> None:
        """Whole ones."""
        for line in events.splitlines():
            if line.startswith(_DATA):
                self._add(_read(line[len(_DATA) :]))

    def _add(self, answer: _SaidAnswer) -> None:
        for choice in answer.choices:
            self._chars += _chars((choice.text, choice.message, choice.delta))
        self._chars += _chars((answer.delta, answer.content_block, answer.content, answer.output))


def _read(data: bytes) -> _SaidAnswer:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return _SaidAnswer()


def _chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return sum(map(_chars, value))
    if isinstance(value, dict):
        return sum(_chars(each) for name, each in value.items() if name not in NO_TEXT)
    return 0
