"""Seconds of CPU that a server and its node cache have used, by part."""

from __future__ import annotations

from contextlib import suppress

import psutil

from examples.cluster.processes import VllmServer, run_processes

# In the names of vLLM's processes; the others of a server take requests.
PARTS = {"VLLM::Worker": "worker", "VLLM::EngineCore": "engine"}


def cpu_s(server: VllmServer) -> dict[str, float]:
    """So far, by part; node caches belong to no server, and only that of the one that is asked has
    anything to do."""
    spent = dict.fromkeys((*PARTS.values(), "API", "node cache"), 0.0)
    named = {each.pid: part for name, part in PARTS.items() for each in server.processes(name)}
    family = {each.pid for each in server.processes()}
    for pid in family | run_processes():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if pid in family:
                part = named.get(pid, "API")
            elif "ucm.store.node" in " ".join(process.cmdline()):
                part = "node cache"
            else:
                continue
            times = process.cpu_times()
            spent[part] += times.user + times.system
    return spent
