"""Bad inputs without end: valid ones that were damaged, and noise; the same ones in every run.

    for data in bad_inputs(seeds, num_inputs, words=WORDS):
        with bounded(data):
            ...

`bounded` is what every reader promises about them: an error of ours or an answer, soon, and within
bounds of memory.
"""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from ucm.errors import UcmError

# Of CPU, so that a busy machine is no hang. Reading any of these inputs takes milliseconds.
_MAX_CPU_S = 10.0
# What reading may map on top of what there is, with all that it leaves behind.
_MAX_GROWTH_BYTES = 128 << 20
_MAX_INPUT_BYTES = 1 << 16
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_FEW, _MANY = 3_000, 100_000

# How many inputs a test reads: some in every run, and as many as were promised in the long one.
few_and_many = pytest.mark.parametrize(
    "num_inputs",
    [
        pytest.param(_FEW, id="few"),
        pytest.param(_MANY, id="many", marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)


def bad_inputs(
    seeds: Sequence[bytes], num_inputs: int, *, words: Sequence[bytes] = (), salt: int = 0
) -> Iterator[bytes]:
    """One in sixteen is noise; the others are seeds with one to eight damages. `words` are what the
    language of the seeds is made of."""
    rng = random.Random(f"{num_inputs} {salt}")
    for _ in range(num_inputs):
        if rng.random() < 1 / 16:
            yield rng.randbytes(rng.randrange(200))
            continue
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            _damage(data, seeds, words, rng)
        yield bytes(data[:_MAX_INPUT_BYTES])


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """In pieces, as a socket may give them."""
    places = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(4)))
    return [
        data[start:stop] for start, stop in zip([0, *places], [*places, len(data)], strict=True)
    ]


def _damage(
    data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes], rng: random.Random
) -> None:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64)))
    kind = rng.randrange(8 if words else 6)
    if kind == 0 and start < len(data):
        data[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        size = rng.choice((1, 2, 4, 8))
        number = rng.choice(_NUMBERS) % (1 << 8 * size)
        data[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))
    elif kind == 2:
        del data[start:stop]
    elif kind == 3:
        data[start:start] = data[start:stop] * rng.choice((1, 1, 2, 100))
    elif kind == 4:
        data[start:stop] = rng.randbytes(rng.randrange(9))
    elif kind == 5:
        other = rng.choice(seeds)
        place = rng.randrange(len(other) + 1)
        data[start:] = other[place:]
    elif kind >= 6:
        data[start : rng.choice((start, stop))] = rng.choice(words)


class Hung(BaseException):
    """No Exception: nobody on the way may take it for his own."""


@contextmanager
def bounded(data: bytes) -> Iterator[None]:
    """An error of ours ends the block, and is all right. Anything else fails, with `data`."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_CPU_S)
    try:
        yield
    except UcmError as error:
        if not str(error):
            raise AssertionError(f"{data!r}: an error that says nothing") from error
    except (Exception, Hung) as error:
        raise AssertionError(f"{data!r}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def bounds() -> Iterator[None]:
    """Around all of a test's inputs: memory beyond the bound is refused, and who computes for too
    long is interrupted."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Hung(f"for more than {_MAX_CPU_S:.0f} s of CPU")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most_bytes = mapped_pages * resource.getpagesize() + _MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)
