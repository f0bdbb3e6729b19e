"""What became of SGLang's questions, for its log and its metrics. From any thread."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from ucm.outcome import Outcome
from ucm.store.node.notices import Notices

_GB: Final = 1e9
_REMEMBERED: Final = 1024


@dataclass
class TransferRates:
    """Pages and GB/s of each transfer since they were last taken."""

    pages: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    gb_per_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def note(self, num_pages: int, nbytes: int, took_s: float) -> None:
        self.pages.append(num_pages)
        self.gb_per_s.append(nbytes / _GB / max(took_s, 1e-9))


class PageCounts:
    """Pages by what was done with them, or by why not."""

    def __init__(self) -> None:
        self.loads = TransferRates()
        self.dumps = TransferRates()
        self._lock = threading.Lock()
        self._pages: Counter[str] = Counter()
        self._notices = Notices(time.monotonic)

    def done(self, what: str, num_pages: int) -> None:
        with self._lock:
            self._pages[what] += num_pages

    def missed(self, what: str, why: Outcome, num_pages: int, text: object = "") -> None:
        """`text` says more, to the log. That a page was never stored is no trouble."""
        with self._lock:
            if num_pages:
                self._pages[f"{what}:{why}"] += num_pages
            if why is not Outcome.NEVER_STORED:
                said = f"{text}; " if text else ""
                self._notices.warn(f"pages_{what}", f"{said}{why}; so far: {self}", of=str(why))

    def __str__(self) -> str:
        return ", ".join(f"{num} {what}" for what, num in sorted(self._pages.items())) or "none"

    def __getitem__(self, what: str) -> int:
        """Pages: "loaded", "stored", or what was not done and why, as in "not_loaded:corrupt"."""
        return self._pages[what]

    def take(self) -> tuple[TransferRates, TransferRates]:
        """Loads and dumps since the last time."""
        with self._lock:
            taken = self.loads, self.dumps
            self.loads, self.dumps = TransferRates(), TransferRates()
            return taken

    def note_transfer(self, *, is_load: bool, num_pages: int, nbytes: int, took_s: float) -> None:
        with self._lock:
            (self.loads if is_load else self.dumps).note(num_pages, nbytes, took_s)
