"""Frames on the node cache's socket: a little-endian u32 length, and so many bytes."""

from __future__ import annotations

import struct
from typing import Final

from ucm.errors import ProtocolError

MAX_FRAME_BYTES: Final = 64 << 20
LENGTH: Final = struct.Struct("<I")


class FrameBuffer:
    """Collects bytes from a socket and gives back whole frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Whole frame bodies completed by `data`. Raises ProtocolError on an absurd length."""
        self._data += data
        frames = []
        start = 0
        while len(self._data) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._data, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(
                    f"a frame of {length} bytes: the peer does not speak UCM's protocol"
                )
            end = start + LENGTH.size + length
            if len(self._data) < end:
                break
            frames.append(bytes(self._data[start + LENGTH.size : end]))
            start = end
        del self._data[:start]
        return frames
