"""Engines of several versions of vLLM, at once on one node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.cluster.processes import ucm_connector
from tests.e2e.deployment import Deployment
from tests.e2e.engines import EngineProcess, fail_without
from tests.e2e.node import Node, engine_sessions


@dataclass
class EngineFleet:
    """One engine of each version, by the model that it is given, and later another one on a node of
    its own. `flags` are those of all."""

    deployment: Deployment
    models: Mapping[str, Path]
    flags: Mapping[str, Any] = field(default_factory=dict)
    running: list[EngineProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        fail_without(list(self.models))

    def start(self, role: str, node: Node) -> dict[str, EngineProcess]:
        """At once, and waits until their node cache is known to each of them."""
        connector = ucm_connector(self.deployment.settings(node), kv_role=role)
        engines = {
            version: self._start(version, Path(node.socket_path).stem, connector)
            for version in self.models
        }
        for version, engine in engines.items():
            assert not version or engine("version") == version
        node.wait("known to its engines", lambda status: self._are_known(engine_sessions(status)))
        return engines

    def _are_known(self, sessions: dict[str, dict[str, int]]) -> bool:
        return sum(each["connections"] > 1 for each in sessions.values()) >= len(self.models)

    def start_plain(self) -> EngineProcess:
        return self._start("", "plain", None)

    def _start(self, version: str, name: str, kv_transfer: dict[str, Any] | None) -> EngineProcess:
        log = self.deployment.folder / f"{name}-{version or 'own'}.log"
        model = self.models[version]
        self.running.append(EngineProcess(version, model, log, kv_transfer, **self.flags))
        return self.running[-1]

    def end(self) -> None:
        while self.running:
            self.running.pop().kill()
