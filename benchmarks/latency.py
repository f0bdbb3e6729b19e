"""A way to a server that takes long: a proxy that holds each request for so many milliseconds.

    python -m benchmarks.latency PORT SERVER_PORT MILLISECONDS

What follows an answer is a new request; the bytes of one that has begun, and answers, go through at
once. A process of its own, so that it takes nobody's GIL.
"""

from __future__ import annotations

import asyncio
import sys

_CHUNK_BYTES = 256 << 10


class _Connection:
    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._has_answered = True

    async def to_server(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while chunk := await client.read(_CHUNK_BYTES):
            if self._has_answered:
                self._has_answered = False
                await asyncio.sleep(self._latency_s)
            server.write(chunk)
            await server.drain()
        server.close()

    async def to_client(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while chunk := await server.read(_CHUNK_BYTES):
            self._has_answered = True
            client.write(chunk)
            await client.drain()
        client.close()


async def _serve(port: int, server_port: int, latency_s: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(latency_s)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", server_port)
        await asyncio.gather(
            connection.to_server(reader, server_writer),
            connection.to_client(server_reader, writer),
            return_exceptions=True,
        )

    async with await asyncio.start_server(accept, "127.0.0.1", port, limit=4 << 20) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) / 1000))
