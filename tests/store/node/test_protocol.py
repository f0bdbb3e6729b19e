"""What goes in comes out, however the bytes are cut on the way; garbage is refused."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.node import protocol as p

CLIENT_MESSAGES = get_args(p.ClientMessage)
NODE_MESSAGES = get_args(p.NodeMessage)
# Counts, offsets and sizes; what is senseless in a message is for other tests.
NUMBERS = st.integers(1, 1 << 40)
COUNTS = st.dictionaries(st.text(max_size=20), NUMBERS, max_size=4)
COSTS = st.floats(0, allow_nan=False)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    Outcome: st.sampled_from(Outcome),
    int: NUMBERS,
    int | None: st.none() | NUMBERS,
    p.ReadCosts | None: st.none() | st.builds(p.ReadCosts, COSTS, COSTS),
    str: st.text(max_size=50),
    bytes: st.binary(max_size=200),
    bool: st.booleans(),
    list[int]: st.lists(NUMBERS | st.sampled_from([p.HAVE, p.NO_ROOM]), max_size=20),
    list[bytes]: st.lists(st.binary(min_size=32, max_size=32), max_size=20),
    dict[str, int]: COUNTS,
    dict[str, Any]: st.dictionaries(
        st.text(max_size=20), NUMBERS | st.booleans() | st.text(max_size=20) | st.none(), max_size=4
    ),
    dict[str, dict[str, int]]: st.dictionaries(st.text(max_size=20), COUNTS, max_size=4),
}
# Fields whose values have rules of their own.
FIELDS = {"fingerprint": st.binary(min_size=32, max_size=32)}


def messages(*kinds: type) -> st.SearchStrategy[Any]:
    def build(kind: type) -> st.SearchStrategy[Any]:
        hints = get_type_hints(kind)
        names = getattr(kind, "__struct_fields__")  # noqa: B009
        values = {name: FIELDS[name] if name in FIELDS else VALUES[hints[name]] for name in names}
        return st.builds(kind, **values)

    return st.one_of([build(kind) for kind in kinds])


def body(frame: bytes) -> bytes:
    (whole,) = p.FrameBuffer().feed(frame)
    return whole


@given(messages(*CLIENT_MESSAGES))
def test_what_a_client_says_is_what_the_node_cache_reads(message: p.ClientMessage) -> None:
    assert p.decode_client(body(p.encode(message))) == message


@given(messages(*NODE_MESSAGES))
def test_what_a_node_cache_says_is_what_a_client_reads(message: p.NodeMessage) -> None:
    assert p.decode_node(body(p.encode(message))) == message


@given(messages(*CLIENT_MESSAGES) | messages(*NODE_MESSAGES))
def test_each_side_refuses_what_only_it_would_say(message: Any) -> None:
    decode = p.decode_node if isinstance(message, CLIENT_MESSAGES) else p.decode_client
    with pytest.raises(ProtocolError, match="unreadable message on the node cache socket"):
        decode(body(p.encode(message)))


@given(st.lists(messages(*CLIENT_MESSAGES), max_size=6), st.data())
def test_frames_are_whole_however_the_bytes_were_cut(
    sent: list[p.ClientMessage], data: st.DataObject
) -> None:
    stream = b"".join(map(p.encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    frames = p.FrameBuffer()

    arrived = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        arrived += frames.feed(stream[start:stop])

    assert [p.decode_client(each) for each in arrived] == sent
    assert frames.feed(b"") == []


@given(st.lists(messages(*CLIENT_MESSAGES), min_size=1, max_size=3))
def test_a_frame_arrives_with_its_last_byte_and_not_before(sent: list[p.ClientMessage]) -> None:
    frames = p.FrameBuffer()
    for message in sent:
        *most, last = p.encode(message)
        assert [frames.feed(bytes([byte])) for byte in most] == [[]] * len(most)
        assert len(frames.feed(bytes([last]))) == 1


@given(st.lists(st.binary(max_size=100), max_size=10))
def test_garbage_is_waited_for_refused_or_unreadable(chunks: list[bytes]) -> None:
    """And bytes never come from nowhere."""
    frames = p.FrameBuffer()
    try:
        bodies = [each for chunk in chunks for each in frames.feed(chunk)]
        assert sum(4 + len(each) for each in bodies) <= sum(map(len, chunks))
        for each in bodies:
            p.decode_client(each)
    except ProtocolError:
        pass


@given(messages(*CLIENT_MESSAGES), st.integers(0, 10_000), st.integers(1, 255))
@example(p.Hello(version=1, session="\x80", role="", pid=1), 9, 32)
def test_a_damaged_message_is_another_message_or_unreadable(
    message: p.ClientMessage, at: int, flipped_bits: int
) -> None:
    damaged = bytearray(body(p.encode(message)))
    damaged[at % len(damaged)] ^= flipped_bits
    try:
        assert isinstance(p.decode_client(bytes(damaged)), CLIENT_MESSAGES)
    except ProtocolError:
        pass


@given(messages(*CLIENT_MESSAGES), st.data())
def test_half_a_message_is_unreadable(message: p.ClientMessage, data: st.DataObject) -> None:
    whole = body(p.encode(message))
    half = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ProtocolError):
        p.decode_client(half)


ABSURD_LENGTHS = {
    "frame": struct.pack("<I", (1 << 32) - 1),
    "frame just over the limit": struct.pack("<I", p.MAX_FRAME_BYTES + 1),
    "frame of which little comes": struct.pack("<I", p.MAX_FRAME_BYTES) + b"little",
    "array": struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff",
    "string": struct.pack("<I", 6) + b"\x92\xdb\xff\xff\xff\xff",
    "list of keys": struct.pack("<I", 13) + b"\x97\xa6Lookup\xdd\xff\xff\xff\xff"[:13],
    "list of releases": struct.pack("<I", 14) + b"\x92\xa7Release\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("stream", ABSURD_LENGTHS.values(), ids=ABSURD_LENGTHS.keys())
def test_an_absurd_length_takes_no_memory(stream: bytes) -> None:
    tracemalloc.start()
    try:
        for each in p.FrameBuffer().feed(stream):
            p.decode_client(each)
    except ProtocolError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_frame_over_the_limit_is_refused_before_it_is_sent() -> None:
    message = p.Release(lookups=[(1 << 62) + i for i in range(p.MAX_FRAME_BYTES // 8)])
    with pytest.raises(ProtocolError, match="over the limit"):
        p.encode(message)
