"""Servers on two nodes, and between them a bucket; with files near, if that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.cluster.seaweedfs import weed_binary
from tests.cluster.seaweedfs import SeaweedServer
from tests.e2e.deployment import Deployment
from tests.e2e.node import Node
from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server

PLACES = {"p1": "prefill", "d1": "decode"}
SEAWEEDFS = pytest.param("seaweedfs", marks=[pytest.mark.long, pytest.mark.cluster])

_IO_TIMEOUT_MS = 2_000
_RETRY_MS = 300


def s3_server(name: str, folder: Path) -> S3Server:
    """One that keeps its objects in memory, or SeaweedFS, where it is installed."""
    if name == "moto":
        return S3Server()
    if weed_binary() is None:
        pytest.skip("SeaweedFS is not installed: `make test-cluster ARGS=--install` does it")
    return SeaweedServer(folder)


class S3Fleet(Deployment):
    """`prefill` stores layer by layer; `decode` loads before the forward pass and stores none."""

    def __init__(self, folder: Path, model: Path, server: S3Server, near: str = "") -> None:
        """`near`: whether there are files before the bucket, "own" ones of each node or "shared"
        ones."""
        super().__init__(folder, model)
        self.server = server
        self.near = near
        self.start("prefill", Node("s3-prefill"), chunk=512, layerwise=True, env=ENVIRONMENT)
        self.start("decode", Node("s3-decode"), role="kv_consumer", env=ENVIRONMENT)

    def settings(self, node: Node, **top: Any) -> dict[str, Any]:
        settings = super().settings(node, **top)
        store = settings["ucm_connectors"][0]["ucm_connector_config"]
        if self.near:
            name = Path(node.socket_path).stem if self.near == "own" else "shared"
            store["storage_backends"] = str(self.folder / name)
        else:
            del store["storage_backends"]
        store |= {
            "store_pipeline": "Cache|Posix|S3" if self.near else "Cache|S3",
            "s3_bucket": BUCKET,
            "s3_endpoint": self.server.url,
            "posix_io_timeout_ms": _IO_TIMEOUT_MS,
            "posix_retry_ms": _RETRY_MS,
        }
        return settings
