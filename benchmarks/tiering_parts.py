"""vLLM's offloading on the CPU build, for tests and benchmarks: with our tier, or vLLM's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Where vLLM finds the copy worker: on PYTHONPATH.
PEERS = Path(__file__).with_name("peers")
_HOST_BYTES = 1 << 28


def offloading(
    tiers: Sequence[Mapping[str, Any]], *, engine_id: str, host_bytes: int = _HOST_BYTES
) -> dict[str, Any]:
    """A --kv-transfer-config. `engine_id` names the host memory in /dev/shm."""
    return {
        "kv_connector": "UCMOffloadingConnector",
        "kv_connector_module_path": "ucm.integration.tiering.connector",
        "kv_role": "kv_both",
        "engine_id": engine_id,
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_tiering",
            "cpu_bytes_to_use": host_bytes,
            "secondary_tiers": [dict(tier) for tier in tiers],
        },
    }


def ucm_tier(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`: UCM_CONFIG_FILE, or the same inline."""
    return {"type": "UcmTier", "module_path": "ucm.integration.tiering.ucm_tier", **settings}
