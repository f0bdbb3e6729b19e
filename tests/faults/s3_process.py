"""The server of `s3_server.py`: moto, one request after the other, because it answers 500 where an
object is replaced while another request reads it. `python -m tests.faults.s3_process PORT`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_one = threading.Lock()


class _OneByOne:
    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with _one:
            return [b"".join(self._app(environ, start_response))]


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), _OneByOne(), threaded=True)
