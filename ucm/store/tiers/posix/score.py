"""What a page is worth keeping, as a time that its file carries: reclaim takes the lowest first.

A file's score is its time of modification, and nothing else is known of it. Each doubling of a
page's uses puts it one span later, each doubling of its depth in the prompt a little earlier:

    now + span * (log2(4 * uses) - log2(1 + depth) / 10)

A span is how long it usually takes until a block is asked for again (recall.py measures it), so the
rule is the same for a store that turns over in minutes and for one that lasts for months; the
longer that is beside a span, the nearer is the order to that of last use. What is not used any more
is overtaken by the clock: no score is further ahead than MAX_AHEAD_NS. docs/reclaim.md has what it
gives.

Filesystems keep times in steps: 1 ns to 1 us on most, 100 ns on SMB, 1 or 2 s on some. Scores that
differ in what is kept differ by seconds and more. Where times are coarse, neighbours in a long
prompt become equal, so that some of its end goes in another order: it costs a few hits.

Pure. Times are nanoseconds since 1970 by the node's own clock. One that is wrong by less than a
span changes little; what is far ahead is held by `bounded_score_ns`.
"""

from __future__ import annotations

from math import log2
from typing import Final

SECOND_NS: Final = 1_000_000_000
MIN_SPAN_NS: Final = SECOND_NS
MAX_SPAN_NS: Final = 6 * 3600 * SECOND_NS
# More uses than this count as so many.
MAX_USES: Final = 64
# Two days.
MAX_AHEAD_NS: Final = MAX_SPAN_NS * 8

# In spans. Most pages are written once and never asked for again; of those that follow something
# well known and have little to do with it, nearly all.
_NEW: Final = -0.5
_ASIDE: Final = -2.0
_DEPTH: Final = 0.1
# A file is not touched for less than this share of a span.
_WORTH_A_TOUCH: Final = 1 / 16
# Clocks of nodes and of the file server differ.
_SKEW_NS: Final = 3600 * SECOND_NS


def first_score_ns(
    now_ns: int, *, uses: int, depth: int, span_ns: int, is_aside: bool = False
) -> int:
    """Of a file that is written. `uses`: how often its block was asked for before, as far as is
    known; none and `is_aside`: see recall.py. `depth`: how many blocks precede it in the prompt."""
    use = log2(4 * min(uses, MAX_USES)) if uses > 0 else _ASIDE if is_aside else _NEW
    return now_ns + int(span_ns * (use - _DEPTH * log2(1 + depth)))


def used_score_ns(score_ns: int, now_ns: int, *, uses: int, depth: int, span_ns: int) -> int | None:
    """Of a file that is used, and has a score by now; None where a new one is not worth a touch:
    it had one as late, perhaps from a node that knew of more uses."""
    # Whoever wrote it had a use for it.
    new_ns = first_score_ns(now_ns, uses=max(1, uses), depth=depth, span_ns=span_ns)
    return new_ns if new_ns - score_ns >= span_ns * _WORTH_A_TOUCH else None


def bounded_score_ns(score_ns: int, changed_ns: int) -> int:
    """The score as reclaim takes it. `changed_ns`: when the file was last written or touched, by
    the file server's clock. What is further ahead of that than scores are is none (a clock was
    wrong, or somebody else has set the time), and counts as used when it was changed."""
    return score_ns if score_ns - changed_ns <= MAX_AHEAD_NS + _SKEW_NS else changed_ns
