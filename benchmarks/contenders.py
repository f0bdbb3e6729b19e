"""Who is measured by handoff.py, and how each one's servers are started."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import lmcache_peer
from benchmarks.lmcache_peer import LmcacheNode
from benchmarks.tiering_parts import PEERS, offloading, ucm_tier
from examples.cluster.processes import (
    MIB,
    HttpServer,
    ProxyServer,
    VllmServer,
    end_run,
    run_folder,
    ucm_connector,
)

BLOCK_TOKENS = 128
CHUNK_TOKENS = 512
# Decode has a whole prompt in one step, should it have to compute it.
WHOLE_TOKENS = 4096
KV_BYTES_PER_TOKEN = {"small": 8 << 10, "mid": 32 << 10}  # in bfloat16
# Small, so that the first prompts, which are not timed, touch all of it: a load into fresh memory
# would measure the kernel's page faults.
KV_CACHE_TOKENS = 8192
SLOWER_S = 0.005
VOCABULARY = 300


@dataclass(frozen=True)
class Contender:
    """`prefill` and `decode` are --kv-transfer-config; `pythonpath` lets vLLM import a spec.
    `nodes`: its own servers, which have to be ready before an engine starts (`nodes_of`).
    `is_slow`: each file takes SLOWER_S longer to open and to create."""

    name: str
    what: str
    prefill: Mapping[str, Any]
    decode: Mapping[str, Any]
    pythonpath: Path | None = None
    chunk_tokens: int = CHUNK_TOKENS
    handoffs: tuple[str, ...] = ("chain",)
    is_one_node: bool = False
    is_slow: bool = False
    nodes: tuple[LmcacheNode, ...] = ()

    @property
    def needs_whole_prompts(self) -> bool:
        """Its prefill must not have a prompt in chunks."""
        return self.chunk_tokens == WHOLE_TOKENS

    @property
    def is_ours(self) -> bool:
        """Only UCM's decode can be told to expect something."""
        return "overlap" in self.handoffs


@dataclass(frozen=True)
class Servers:
    """What runs for one contender: `proxies` by their --handoff."""

    contender: Contender
    prefill: VllmServer
    decode: VllmServer
    proxies: Mapping[str, ProxyServer]


def contenders(store: Path, mounted: Path | None) -> list[Contender]:
    """`mounted` is where files are slower; without it nobody uses such."""
    found = _contenders(store / "warm", is_slow=False)
    return found if mounted is None else found + _contenders(mounted, is_slow=True)


def _contenders(folder: Path, *, is_slow: bool) -> list[Contender]:
    found = [*_ours(folder, is_slow=is_slow), *_peers(folder, is_slow=is_slow)]
    return found if lmcache_peer.why_not() else found + _lmcache(folder, is_slow=is_slow)


def left_out() -> list[str]:
    """A line for each contender that can't run here, with the command that changes that."""
    why_not = lmcache_peer.why_not()
    return [f"lmcache, lmcache-files: left out, {why_not}"] if why_not else []


def _ours(folder: Path, *, is_slow: bool) -> list[Contender]:
    mark = "-slow" if is_slow else ""

    def settings(directory: str, socket: str) -> dict[str, Any]:
        store = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(folder / directory),
            "cache_buffer_capacity_gb": 1,
            "node_cache_idle_exit_s": 5,
            "node_cache_socket": str(run_folder() / f"{socket}{mark}.sock"),
        }
        entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        return {"ucm_connectors": [entry]}

    def ucm(directory: str, socket: str) -> dict[str, Any]:
        return ucm_connector(settings(directory, socket))

    def tiering(role: str, socket: str) -> dict[str, Any]:
        return _offloading(role, ucm_tier(settings("tiering", socket)))

    ours = partial(Contender, handoffs=("chain", "overlap"), is_slow=is_slow)
    return [
        ours(
            f"ucm-dram{mark}",
            "UCM, one node: prefill's pages are in the node cache",
            ucm("dram", "one"),
            ucm("dram", "one"),
            is_one_node=True,
        ),
        ours(
            f"ucm-files{mark}",
            "UCM, two nodes: decode's node cache reads files",
            ucm("files", "left"),
            ucm("files", "right"),
        ),
        ours(
            f"tiering{mark}",
            "UcmTier below vLLM's offloading, two nodes, copy worker for CPU",
            tiering("prefill", "tier-left"),
            tiering("decode", "tier-right"),
            PEERS,
        ),
    ]


def _peers(folder: Path, *, is_slow: bool) -> list[Contender]:
    mark = "-slow" if is_slow else ""
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
    }

    def fs(role: str) -> dict[str, Any]:
        """As vLLM has it."""
        ours = _offloading(role, {"type": "fs", "root_dir": str(folder / "fs")})
        del ours["kv_connector_module_path"]
        return {**ours, "kv_connector": "OffloadingConnector"}

    return [
        Contender(
            f"example{mark}",
            "vLLM's ExampleConnector, prefill in one chunk",
            example,
            example,
            # It saves with the first chunk, and only that; decode would break on the load.
            chunk_tokens=WHOLE_TOKENS,
            is_slow=is_slow,
        ),
        Contender(
            f"fs{mark}",
            "vLLM's fs tier, copy worker for CPU",
            fs("prefill"),
            fs("decode"),
            PEERS,
            is_slow=is_slow,
        ),
    ]


def _lmcache(folder: Path, *, is_slow: bool) -> list[Contender]:
    mark = "-slow" if is_slow else ""

    def contender(name: str, what: str, *names: str) -> Contender:
        files = folder / name
        nodes = tuple(LmcacheNode.new(node, files=files) for node in names)
        return Contender(
            f"{name}{mark}",
            what,
            nodes[0].kv_transfer(),
            nodes[-1].kv_transfer(),
            lmcache_peer.ENVIRONMENT,
            is_one_node=len(nodes) == 1,
            is_slow=is_slow,
            nodes=nodes,
        )

    return [
        contender("lmcache", "LMCache's MP server, one node: pages are in its DRAM", "one"),
        contender("lmcache-files", "LMCache's MP servers, two nodes, fs L2", "left", "right"),
    ]


def _offloading(role: str, tier: Mapping[str, Any]) -> dict[str, Any]:
    run = run_folder().name.removeprefix("ucm-")
    return offloading([tier], engine_id=f"{run}-{role}", host_bytes=1 << 30)


@contextmanager
def nodes_of(contender: Contender, *, logs: Path) -> Iterator[list[HttpServer]]:
    """The servers that its engines need, ready; none for most contenders."""
    try:
        with ExitStack() as stack:
            started = [
                stack.enter_context(node.start(logs / f"{contender.name}-{node.name}.log"))
                for node in contender.nodes
            ]
            for server in started:
                server.wait_ready()
            yield started
    finally:
        if contender.nodes:
            lmcache_peer.remove_shared_memory()


@contextmanager
def running(contender: Contender, model: Path, *, size: str, logs: Path) -> Iterator[Servers]:
    """Its two servers and a proxy for each of its hand-offs, all ready."""
    kv_cache_bytes = KV_CACHE_TOKENS * KV_BYTES_PER_TOKEN[size]

    def server(role: str, kv_transfer: Mapping[str, Any], chunk_tokens: int) -> VllmServer:
        return VllmServer(
            model,
            kv_transfer=kv_transfer,
            log=logs / f"{contender.name}-{role}.log",
            dtype="bfloat16",
            kv_cache_bytes=max(kv_cache_bytes, 64 * MIB),
            args=["--max-num-batched-tokens", str(chunk_tokens)],
            env={"PYTHONPATH": str(contender.pythonpath)} if contender.pythonpath else {},
        )

    try:
        with ExitStack() as stack:
            stack.enter_context(nodes_of(contender, logs=logs))
            prefill = stack.enter_context(
                server("prefill", contender.prefill, contender.chunk_tokens)
            )
            decode = stack.enter_context(server("decode", contender.decode, WHOLE_TOKENS))
            proxies = {
                handoff: stack.enter_context(
                    ProxyServer(
                        prefill,
                        decode,
                        log=logs / f"{contender.name}-{handoff}.log",
                        args=["--handoff", handoff],
                    )
                )
                for handoff in contender.handoffs
            }
            for each in (prefill, decode, *proxies.values()):
                each.wait_ready()
            part_cores([prefill], [decode])
            yield Servers(contender, prefill, decode, proxies)
    finally:
        end_run()
        for kv_transfer in (contender.prefill, contender.decode):
            remove_shared_memory(kv_transfer)


def part_cores(prefill: Sequence[HttpServer], decode: Sequence[HttpServer]) -> None:
    """Half of the cores for each, as if on two machines: vLLM's workers spin for a second after
    each step, also one that computes nothing, and would take the core from the other server. Caches
    of all contenders run where there is room."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if not half:
        return
    for servers, its in ((prefill, cores[:half]), (decode, cores[half:])):
        for process in (each for server in servers for each in server.processes()):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, its)


def remove_shared_memory(kv_transfer: Mapping[str, Any]) -> None:
    """vLLM's offload leaves its memory, a gigabyte of it, when a server is told to stop."""
    if engine_id := kv_transfer.get("engine_id"):
        Path(f"/dev/shm/vllm_offload_{engine_id}.mmap").unlink(missing_ok=True)


def prompt_of(tokens: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(tokens)]
