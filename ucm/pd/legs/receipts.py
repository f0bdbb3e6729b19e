"""What decode says beside its answer is for the proxy: how much of the conversation is stored.
Pure."""

from __future__ import annotations

import msgspec

from ucm import handoff
from ucm.pd.legs.rewrite import params_of, wordless

_NAME = f'"{handoff.NAME}"'.encode()


def may_have_receipt(answer: bytes) -> bool:
    """Cheap."""
    return _NAME in answer


def without_receipt(answer: bytes) -> tuple[bytes, int]:
    """A whole answer without words of a hand-off, and how many tokens these say are stored; as it
    is, and 0, where there are none. All else that a connector says stays."""
    raw = params_of(answer)
    if raw is None:
        return answer, 0
    params = msgspec.json.decode(raw)
    if handoff.NAME not in params:
        return answer, 0
    words = handoff.parse(params)
    # Nothing else in it can look like this: in a text quotes are escaped.
    kept = msgspec.json.encode(wordless(params))
    return answer.replace(raw, kept), words.tokens if isinstance(words, handoff.Receipt) else 0
