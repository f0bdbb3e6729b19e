"""As vllm-ascend's plugin does before an engine: the name UCMConnector is its own class's."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

for _name in ("UCMConnector", "UCMConnectorV1"):
    KVConnectorFactory.register_connector(_name, "tests.e2e.ascend_engine", "AscendConnector")
