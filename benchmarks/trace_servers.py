"""The servers of one contender of trace.py: engines, what they share, and what clients ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.contenders import (
    BLOCK_TOKENS,
    Contender,
    nodes_of,
    part_cores,
    remove_shared_memory,
)
from examples.cluster.client import Client
from examples.cluster.processes import (
    GuardedProcess,
    HttpServer,
    ProxyServer,
    VllmServer,
    end_run,
    run_processes,
)

MAX_MODEL_LEN: Final = 8192
CHUNK_TOKENS: Final = 1024
# In the names of vLLM's processes that compute; the others of an engine take requests.
_COMPUTING: Final = "VLLM::"
# Of everybody: conversations stay at their engines, where prefix caches have them. Agents of one
# system prompt open alike, hence the bound.
PROXY: Final = ("--affinity", "prefix", "--affinity-max-ahead", "1")
# Of UCM, as docs/pd.md advises where there are conversations; peers have nothing like it.
OUR_PROXY: Final = ("--handoff", "overlap", "--known-for-s", "600")


@dataclass(frozen=True)
class Topology:
    """How many engines prefill and how many decode."""

    name: str
    prefills: int
    decodes: int


TOPOLOGIES: Final = {each.name: each for each in (Topology("1p1d", 1, 1), Topology("2p2d", 2, 2))}


@dataclass(frozen=True)
class Fleet:
    """`front` is what clients ask. `groups`: servers by their part, for what they have used."""

    front: Client
    engines: tuple[VllmServer, ...]
    groups: Mapping[str, tuple[GuardedProcess, ...]]


@dataclass(frozen=True)
class Used:
    """By processes since their start: seconds of CPU by part, and bytes that they have read and
    written by system calls on files and pipes; messages of sockets are none of them."""

    cpu_s: Mapping[str, float] = field(default_factory=dict)
    read_bytes: int = 0
    written_bytes: int = 0

    def __sub__(self, earlier: Used) -> Used:
        return Used(
            {part: spent - earlier.cpu_s.get(part, 0.0) for part, spent in self.cpu_s.items()},
            self.read_bytes - earlier.read_bytes,
            self.written_bytes - earlier.written_bytes,
        )


@contextmanager
def plain(model: Path, *, kv_cache_bytes: int, logs: Path) -> Iterator[Fleet]:
    """One engine without a connector, on all cores."""
    try:
        with _engine(model, None, "plain", kv_cache_bytes, logs) as engine:
            engine.wait_ready()
            yield Fleet(engine.client, (engine,), {"engine": (engine,)})
    finally:
        end_run()


@contextmanager
def behind_a_proxy(
    contender: Contender, topology: Topology, model: Path, *, kv_cache_bytes: int, logs: Path
) -> Iterator[Fleet]:
    """Its engines, on half of the cores each role; caches and proxy are where there is room."""
    try:
        with ExitStack() as stack:
            nodes = stack.enter_context(nodes_of(contender, logs=logs))

            def engines(role: str, kv_transfer: Mapping[str, Any], num: int) -> list[VllmServer]:
                return [
                    stack.enter_context(
                        _engine(
                            model,
                            _of_its_own(kv_transfer, number),
                            f"{contender.name}-{role}{number}",
                            kv_cache_bytes,
                            logs,
                            contender,
                        )
                    )
                    for number in range(num)
                ]

            prefills = engines("prefill", contender.prefill, topology.prefills)
            decodes = engines("decode", contender.decode, topology.decodes)
            proxy = stack.enter_context(_proxy(contender, prefills, decodes, logs))
            for server in (*prefills, *decodes, proxy):
                server.wait_ready()
            part_cores(prefills, decodes)
            parts: dict[str, tuple[GuardedProcess, ...]] = {
                "prefill": tuple(prefills),
                "decode": tuple(decodes),
                "proxy": (proxy,),
                "cache": tuple(nodes),
            }
            yield Fleet(proxy.client, (*prefills, *decodes), parts)
    finally:
        end_run()
        for number in range(max(topology.prefills, topology.decodes)):
            for kv_transfer in (contender.prefill, contender.decode):
                remove_shared_memory(_of_its_own(kv_transfer, number))


def used(fleet: Fleet) -> Used:
    """So far, by all processes of this run. Node caches have left their engines' families."""
    families = {
        process.pid: part
        for part, servers in fleet.groups.items()
        for server in servers
        for process in server.processes()
    }
    computing = {
        process.pid for engine in fleet.engines for process in engine.processes(_COMPUTING)
    }
    families |= {
        process.pid: "API"
        for engine in fleet.engines
        for process in engine.processes()
        if process.pid not in computing
    }
    cpu_s: dict[str, float] = {}
    read = written = 0
    for pid in run_processes() | families.keys():
        try:
            process = psutil.Process(pid)
            times, moved = process.cpu_times(), process.io_counters()
        except psutil.NoSuchProcess:
            continue
        part = families.get(pid, "cache")
        cpu_s[part] = cpu_s.get(part, 0.0) + times.user + times.system
        read += moved.read_chars
        written += moved.write_chars
    return Used(cpu_s, read, written)


def _engine(
    model: Path,
    kv_transfer: Mapping[str, Any] | None,
    name: str,
    kv_cache_bytes: int,
    logs: Path,
    contender: Contender | None = None,
) -> VllmServer:
    pythonpath = contender.pythonpath if contender else None
    whole = contender is not None and contender.needs_whole_prompts
    chunk_tokens = MAX_MODEL_LEN if whole else CHUNK_TOKENS
    return VllmServer(
        model,
        kv_transfer=kv_transfer,
        log=logs / f"{name}.log",
        block_size=BLOCK_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_bytes=kv_cache_bytes,
        args=["--max-num-batched-tokens", str(chunk_tokens)],
        env={"PYTHONPATH": str(pythonpath)} if pythonpath else {},
    )


def _of_its_own(kv_transfer: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Engines of one role must not share the host memory that an offload's id names."""
    named = kv_transfer.get("engine_id")
    return {**kv_transfer, "engine_id": f"{named}-{number}"} if named else dict(kv_transfer)


def _proxy(
    contender: Contender, prefills: list[VllmServer], decodes: list[VllmServer], logs: Path
) -> HttpServer:
    more = [f"--prefiller-port={each.port}" for each in prefills[1:]]
    more += [f"--decoder-port={each.port}" for each in decodes[1:]]
    more += (*PROXY, *OUR_PROXY) if contender.is_ours else PROXY
    log = logs / f"{contender.name}-proxy.log"
    return ProxyServer(prefills[0], decodes[0], log=log, args=more)
