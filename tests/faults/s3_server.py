"""A real S3 server (moto's) as a process of its own, that tests may kill, stop and start again.

It keeps objects in memory: what it had is gone when it starts again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from typing_extensions import Self

from tests.source import ROOT
from tests.store.node.support import wait_until

BUCKET = "pages"
REGION = "us-east-1"
# Any will do for a server that checks none.
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "a-key-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}
# The server shows private objects to whoever says a name.
_SOMEBODY = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=somebody/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=none",
    "Content-Type": "application/octet-stream",
}
_SOON_S = 30.0


class S3Server:
    """`checks_after`: how many requests are let in before credentials are looked at; None: all."""

    keeps_objects = False
    # What `ask` says who it is with.
    headers: ClassVar[Mapping[str, str]] = _SOMEBODY

    def __init__(self, *, checks_after: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._checks_after = checks_after
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """With an empty bucket."""
        environment = dict(os.environ)
        if self._checks_after is not None:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = str(self._checks_after)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.s3_process", str(self.port)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._is_up, "the S3 server answers", within_s=_SOON_S)

    def _is_up(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "it has ended"
        try:
            self.ask("PUT", "")
        except OSError:
            return False
        return True

    def change_locks(self) -> None:
        """Whoever it lets in now is refused from its next start on."""
        self._checks_after = 1

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It takes connections and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def ask(self, method: str, name: str, content: bytes | None = None) -> bytes:
        """As another program would, without any client of ours."""
        url = f"{self.url}/{BUCKET}/{name}".rstrip("/")
        request = urllib.request.Request(url, data=content, method=method, headers=self.headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bytes(answer.read())

    def has(self, name: str) -> bool:
        try:
            self.ask("HEAD", name)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False
        return True

    def clear(self) -> None:
        """Makes the server forget everything, and the bucket anew."""
        request = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        with urllib.request.urlopen(request, timeout=5):
            pass
        self.ask("PUT", "")
