"""What people should hear of trouble, without drowning in it: each kind of it once a minute.

Counters say how often; a notice says what, with the file's name and the system's words.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger(__name__)

_EVERY_S = 60.0


class Notices:
    """Owned by one thread: the event loop's, or a link's."""

    def __init__(
        self, clock: Callable[[], float], on_said: Callable[[str], None] = lambda text: None
    ) -> None:
        """`on_said` hears what is logged, for those who read another log."""
        self.on_said = on_said
        self._clock = clock
        self._said_s: dict[tuple[str, str], float] = {}
        self._unsaid: Counter[tuple[str, str]] = Counter()

    def warn(self, kind: str, text: object, *, of: str = "") -> None:
        """Logs `text`, unless there was a notice of this kind a moment ago, of the same thing.
        Kinds and things are few and fixed: they are remembered for good."""
        now_s = self._clock()
        same = kind, of
        said_s = self._said_s.get(same)
        if said_s is not None and now_s - said_s < _EVERY_S:
            self._unsaid[same] += 1
            return
        self._said_s[same] = now_s
        unsaid = self._unsaid.pop(same, 0)
        more = f" ({unsaid} more like it since the last notice)" if unsaid else ""
        said = f"{kind.replace('_', ' ')}: {text}{more}"
        logger.warning("%s", said)
        self.on_said(said)
