"""examples/tiering.json is what vLLM takes, and what docs/tiering.md shows."""

from __future__ import annotations

import json
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from tests.source import ROOT
from ucm.integration.tiering.connector import UCMOffloadingConnector
from ucm.integration.tiering.ucm_tier import UcmTier

TEXT = (ROOT / "examples" / "tiering.json").read_text()
EXAMPLE: dict[str, Any] = json.loads(TEXT)


def test_vllm_finds_the_connector_the_spec_and_the_tier_that_it_names() -> None:
    extra = EXAMPLE["kv_connector_extra_config"]
    transfer = KVTransferConfig(**EXAMPLE)

    assert KVConnectorFactory.get_connector_class(transfer) is UCMOffloadingConnector
    spec = OffloadingSpecFactory.get_spec_cls(extra)
    (tier,) = extra["secondary_tiers"]
    assert SecondaryTierFactory.get_tier_class(tier) is UcmTier
    assert any(name.startswith("ucm_tiering_") for name in spec.build_metric_definitions(extra))


def test_the_document_shows_it_as_it_is() -> None:
    text = (ROOT / "docs" / "tiering.md").read_text()

    assert TEXT.strip() in text.replace("\n    ", "\n")
