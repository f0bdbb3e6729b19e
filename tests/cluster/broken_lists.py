"""A way to an S3 server that breaks at a LIST: what was listed until then has come."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress

from typing_extensions import Self

_LIST = b"list-type=2"
_RECEIVED_BYTES = 1 << 16


class BrokenLists:
    """Forwards connections, and closes those that ask for a LIST once `break_after` so many were
    asked for."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._left: int | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.num_broken = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def break_after(self, num_lists: int | None) -> None:
        """None: never."""
        with self._lock:
            self._left, self.num_broken = num_lists, 0

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            to = {client: server, server: client}
            with suppress(OSError):
                while True:
                    for each in select.select([client, server], [], [])[0]:
                        received = each.recv(_RECEIVED_BYTES)
                        if not received or (each is client and self._breaks(received)):
                            return
                        to[each].sendall(received)

    def _breaks(self, received: bytes) -> bool:
        """The line of a request comes in one piece."""
        if _LIST not in received:
            return False
        with self._lock:
            if self._left is None:
                return False
            self._left -= 1
            self.num_broken += self._left < 0
            return self._left < 0
