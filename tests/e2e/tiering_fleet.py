"""Servers whose vLLM offloads by itself, with our tier below it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.tiering_parts import PEERS, offloading, ucm_tier
from examples.cluster.client import by_label
from examples.cluster.processes import run_folder
from tests.e2e.checks import wait_until
from tests.e2e.deployment import Deployment, Engine
from tests.e2e.node import Node, engine_sessions
from tests.e2e.store import Store

ROW_TOKENS = 128


class TieringFleet(Deployment):
    """`with_tiers` starts an engine with vLLM's offloading and our tier."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self._memories: list[Path] = []

    def with_tiers(self, name: str, node: Node, **options: Any) -> Engine:
        engine_id = f"{run_folder().name.removeprefix('ucm-')}-{name}"
        self._memories.append(Path(f"/dev/shm/vllm_offload_{engine_id}.mmap"))

        def wrap(connector: dict[str, Any]) -> dict[str, Any]:
            tier = ucm_tier(connector["kv_connector_extra_config"])
            return offloading([tier], engine_id=engine_id)

        return self.start(name, node, wrap=wrap, env={"PYTHONPATH": str(PEERS)}, **options)

    def wait_ready(self) -> None:
        """An engine serves without its node cache until that is there."""
        for engine in self.engines.values():
            engine.server.wait_ready()
            engine.node.wait("known to its engine", lambda status: bool(engine_sessions(status)))

    def wait_stored_by(self, name: str) -> None:
        """Until nothing of what it has computed is on its way any more: vLLM copies to its host
        memory in later steps, and hands on from there."""
        client = self[name].client

        def is_quiet() -> bool:
            metrics = client.metrics()
            jobs = by_label(metrics, "vllm:kv_offload_tiering_active_cascade_jobs", "tier")
            return not any(jobs.values())

        seen: list[int] = []

        def is_stored() -> bool:
            self[name].node.wait_quiet()
            seen.append(len(self.store.blocks()))
            return is_quiet() and len(seen) > _LOOKS and len(set(seen[-_LOOKS:])) == 1

        wait_until(is_stored, f"all that {name} has computed is stored")

    def kill(self) -> None:
        super().kill()
        for memory in self._memories:  # vLLM leaves it when it is killed
            memory.unlink(missing_ok=True)


# So often nothing new is in the store, over a second.
_LOOKS = 20


def middle_row(store: Store, *, num_rows: int) -> Path:
    """About the middle one of the prompt stored last, which has `num_rows`: they are published in
    its order."""
    last = sorted(store.blocks(), key=lambda path: path.stat().st_ctime_ns)[-num_rows:]
    return last[num_rows // 2]


def promises(engine: Engine) -> Counter[str]:
    return by_label(engine.client.metrics(), "ucm_tiering_promises_total", "outcome")
