"""Servers on two nodes, and between them a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.deployment import Deployment
from tests.e2e.node import Node
from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server

_IO_TIMEOUT_MS = 2_000
_RETRY_MS = 300


class S3Fleet(Deployment):
    """`prefill` stores layer by layer; `decode` loads before the forward pass and stores none."""

    def __init__(self, folder: Path, model: Path, server: S3Server) -> None:
        super().__init__(folder, model)
        self.server = server
        self.start("prefill", Node("s3-prefill"), chunk=512, layerwise=True, env=ENVIRONMENT)
        self.start("decode", Node("s3-decode"), role="kv_consumer", env=ENVIRONMENT)

    def settings(self, node: Node, **top: Any) -> dict[str, Any]:
        settings = super().settings(node, **top)
        store = settings["ucm_connectors"][0]["ucm_connector_config"]
        del store["storage_backends"]
        store |= {
            "store_pipeline": "Cache|S3",
            "s3_bucket": BUCKET,
            "s3_endpoint": self.server.url,
            "posix_io_timeout_ms": _IO_TIMEOUT_MS,
            "posix_retry_ms": _RETRY_MS,
        }
        return settings
