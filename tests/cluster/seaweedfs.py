"""SeaweedFS's S3 server as tests use the other one, with two differences: what it had is there when
it starts again, and it looks at credentials always."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from examples.cluster.seaweedfs import ALL_ACTIONS, CREDENTIALS, SeaweedFS
from tests.faults.s3_server import BUCKET, S3Server

_KEY = re.compile(r"<Key>([^<]+)</Key>")


class SeaweedServer(S3Server):
    keeps_objects = True
    # Who says nothing may do all; a name of nobody's is refused.
    headers: ClassVar[Mapping[str, str]] = {"Content-Type": "application/octet-stream"}

    def __init__(
        self, folder: Path, *, actions: Sequence[str] = ALL_ACTIONS, domain: str = ""
    ) -> None:
        """`actions`: what the credentials of tests are good for; nobody's are good for all."""
        super().__init__()
        self._actions, self._domain = actions, domain
        self._folder = folder
        self._seaweed: SeaweedFS | None = None
        self._credentials = CREDENTIALS

    def start(self) -> None:
        seaweed = self._seaweed = SeaweedFS(
            self._folder,
            bucket=BUCKET,
            port=self.port,
            credentials=self._credentials,
            actions=self._actions,
            domain=self._domain,
        )
        seaweed.wait_ready()
        seaweed.make_bucket()

    def change_locks(self) -> None:
        self._credentials = {name: f"another-{value}" for name, value in CREDENTIALS.items()}

    def kill(self) -> None:
        seaweed, self._seaweed = self._seaweed, None
        if seaweed is not None:
            seaweed.kill()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        assert self._seaweed is not None
        self._seaweed.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._seaweed.send_signal(signal.SIGCONT)

    def clear(self) -> None:
        """The bucket stays."""
        while names := self.names():
            for name in names:
                self.ask("DELETE", name)

    def names(self) -> list[str]:
        """The first thousand."""
        return _KEY.findall(self.ask("GET", "?list-type=2&max-keys=1000").decode())
