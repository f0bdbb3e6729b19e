"""LMCache as a peer in benchmarks: a cache server for each node, and what an engine is told of it.

    node = LmcacheNode.new("left", files=folder)
    with node.start(logs / "lmcache-left.log") as server:
        server.wait_ready()
        VllmServer(..., kv_transfer=node.kv_transfer(), env={"PYTHONPATH": str(ENVIRONMENT)})

Its packages have a folder of their own, which `make peers` fills from requirements/peers.txt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.cluster.processes import HttpServer, free_port

# On PYTHONPATH of its servers and of engines that speak to them.
ENVIRONMENT = Path(sys.prefix) / "peers"
SHARED_MEMORY = Path("/dev/shm")
CHUNK_TOKENS = 128  # a block of our engines
_WORKERS = 4  # threads that copy: one for each engine of a node, so that none waits for another's

# Without word to its makers, and with the same names of chunks in all processes.
_VARIABLES: Mapping[str, str] = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
}


def why_not() -> str:
    """Why it can't run here, with what to do about it; empty if it can."""
    return (
        ""
        if (ENVIRONMENT / ".ready").exists()
        else f"it is not installed in {ENVIRONMENT}: make peers"
    )


@dataclass(frozen=True)
class LmcacheNode:
    """One node's cache server: its DRAM, with `files`, which all nodes share, below it."""

    name: str
    files: Path
    port: int
    http_port: int
    dram_gb: float

    @classmethod
    def new(cls, name: str, *, files: Path, dram_gb: float = 1.0) -> LmcacheNode:
        return cls(name, files, free_port(), free_port(), dram_gb)

    def start(self, log: Path) -> HttpServer:
        """Its server; an engine that starts before it is ready gives up."""
        command = [sys.executable, "-m", "lmcache.cli.main", "server"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.http_port)]
        command += ["--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", str(self.dram_gb)]
        command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "lmcache_driven"]
        command += ["--max-workers", str(_WORKERS)]
        # What was read stays in DRAM, as in a node cache; by default each hit reads files again.
        command += ["--l2-prefetch-policy", "retain"]
        command += ["--l2-adapter", json.dumps({"type": "fs", "base_path": str(self.files)})]
        env = {**_VARIABLES, "PYTHONPATH": str(ENVIRONMENT)}
        return HttpServer(
            command, port=self.http_port, log=log, env=env, health_path="/healthcheck"
        )

    def kv_transfer(self) -> dict[str, Any]:
        """--kv-transfer-config of this node's engines, with the connector that comes with it. On a
        CPU the server copies from and to the engine's cache in shared memory, as with CUDA's IPC on
        a GPU. Answers are stored as ours are."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self.port,
                "lmcache.mp.mp_transfer_mode": "lmcache_driven",
                "lmcache.mp.save_decode_cache": True,
            },
        }


def remove_shared_memory() -> None:
    """An engine that vLLM kills, as it does when it is told to stop, leaves its cache in there."""
    for file in SHARED_MEMORY.glob("lmcache_kv_*_*"):
        pid = file.name.split("_")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)
