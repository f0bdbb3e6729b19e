"""Between a client and an S3 server: breaks off the requests that a test names, and hands on all
others."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from typing_extensions import Self

_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


class S3Proxy:
    """`calls` are those that came, by method, broken off or not."""

    def __init__(self, server_port: int) -> None:
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._to_break: Counter[tuple[str, str]] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def hand_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if proxy._breaks(self.command, self.path):
                    self.close_connection = True
                    return
                server = http.client.HTTPConnection("127.0.0.1", server_port, timeout=10)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
                self.send_response_only(answer.status, answer.reason)
                length = answer.headers.get("content-length", str(len(content)))
                for name, value in answer.getheaders():
                    if name.lower() not in (*_HOP_BY_HOP, "content-length"):
                        self.send_header(name, value)
                self.send_header("content-length", length)
                self.end_headers()
                self.wfile.write(content)
                server.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = hand_on  # noqa: N815 its base's

            def log_request(self, *answer: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def break_off(self, method: str, end_of_name: str, *, times: int = 10_000) -> None:
        """The next `times` of these requests get no answer."""
        with self._lock:
            self._to_break[method, end_of_name] = times

    def heal(self) -> None:
        with self._lock:
            self._to_break.clear()

    def _breaks(self, method: str, path: str) -> bool:
        with self._lock:
            self.calls[method] += 1
            for (of, end_of_name), times in self._to_break.items():
                if times and of == method and path.partition("?")[0].endswith(end_of_name):
                    self._to_break[of, end_of_name] -= 1
                    return True
        return False

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
