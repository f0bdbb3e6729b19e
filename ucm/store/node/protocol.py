"""What is said over the node cache's socket.

A frame is a little-endian u32 length and a msgpack body. A client opens with `Hello`; the node
cache answers with `Welcome`, to which the memory's file descriptor is attached (SCM_RIGHTS).
After that each side sends when it likes; answers carry the id of their question.

A *session* is one engine's life on one node cache: its scheduler side and all its ranks connect
under the same session name. Pins and unfinished slots belong to the session and are given back
when its last connection has closed, because a rank may still be copying when the scheduler side
is gone.

Keys travel as 32 bytes; `ns` is a number that the client chose in `OpenNamespace`, valid for its
connection. Offsets are bytes into the shared memory.
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

import msgspec

from ucm.errors import ProtocolError

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 64 << 20
_T = TypeVar("_T")
_LENGTH = struct.Struct("<I")

HAVE: Final = -1
NO_ROOM: Final = -2


# -- client to node cache ------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    version: int
    session: str
    role: str  # "scheduler", "worker", "tool"
    pid: int


class MemoryReady(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A worker has mapped the memory and can copy from and to every slot."""


class OpenNamespace(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    ns: int
    fingerprint: bytes
    page_bytes: int
    block_tokens: int
    manifest: bytes


class Lookup(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Which leading blocks can be had?

    Of `keys[:read_from]` the client only wants to know which are stored (it has their contents);
    `keys[read_from:]` are brought into slots and pinned, up to the first that can't be had.
    With `load` false nothing is read or pinned. Settled after `timeout_ms` with what is there.
    """

    id: int
    ns: int
    keys: list[bytes]
    read_from: int
    load: bool
    timeout_ms: int


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Gives back the pins of answered lookups, or withdraws unanswered ones."""

    lookups: list[int]


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Slots to dump into. Answered block by block: an offset, HAVE, or NO_ROOM. `parents[i]`
    precedes `keys[i]` in the prompt (empty for the first block of a prompt)."""

    id: int
    ns: int
    keys: list[bytes]
    parents: list[bytes]


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The slots of `keys` hold their pages. In prompt order, with parents as in `Reserve`."""

    ns: int
    keys: list[bytes]
    parents: list[bytes]


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The slots reserved for `keys` won't be filled, and nobody writes into them any more."""

    ns: int
    keys: list[bytes]


class GetStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    id: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Finish queued writes (bounded), then leave."""


# -- node cache to client ------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    version: int
    arena: str
    capacity_bytes: int
    extent_bytes: int
    pid: int


class NamespaceOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`error` is empty when all is well. Not `refused` in spite of an error: the manifest could not
    be written, say on a read-only mount; pages can still be had."""

    ns: int
    error: str
    refused: bool


class LookupReply(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`offsets[i]` holds the page of `keys[read_from + i]`, pinned until `Release`. `from_files` of
    them were read for this lookup. Of `keys[:read_from]` the first `head_stored` are in the store.
    Without `load` nothing is pinned and `num_stored` counts what follows `read_from`. `reason` says
    what ended the prefix (empty: nothing did)."""

    id: int
    offsets: list[int]
    num_stored: int
    from_files: int
    head_stored: int
    reason: str


class ReserveReply(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    id: int
    offsets: list[int]


class SpanInUse(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """To workers: this part of the memory holds slots from now on; pin or map it ahead."""

    offset: int
    nbytes: int


class RanksReady(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """To the scheduler side: how many ranks of the session have mapped the memory."""

    count: int


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    id: int
    pid: int
    arena: str
    slots: dict[str, int]
    sessions: dict[str, dict[str, int]]
    queues: dict[str, int]
    counters: dict[str, int]
    invariant: str  # empty: holds


ClientMessage = (
    Hello
    | MemoryReady
    | OpenNamespace
    | Lookup
    | Release
    | Reserve
    | Commit
    | Abort
    | GetStatus
    | Shutdown
)
NodeMessage = (
    Welcome | NamespaceOpened | LookupReply | ReserveReply | SpanInUse | RanksReady | Status
)

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_node_decoder: msgspec.msgpack.Decoder[NodeMessage] = msgspec.msgpack.Decoder(NodeMessage)


def encode(message: ClientMessage | NodeMessage) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is over the limit")
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Collects bytes from a socket and gives back whole frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Whole frame bodies completed by `data`. Raises ProtocolError on an absurd length."""
        self._data += data
        frames = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(
                    f"a frame of {length} bytes: the peer does not speak UCM's protocol"
                )
            end = start + _LENGTH.size + length
            if len(self._data) < end:
                break
            frames.append(bytes(self._data[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return frames


def decode_client(body: bytes) -> ClientMessage:
    return _decode(_client_decoder, body)


def decode_node(body: bytes) -> NodeMessage:
    return _decode(_node_decoder, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"unreadable message on the node cache socket: {error}") from error
