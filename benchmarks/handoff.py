"""What a hit in a store costs decode: its TTFT on a store hit minus its TTFT on a local prefix hit.

For each contender a prefill and a decode server of the mid-sized model are started, with a
directory between them; the prompt is prefilled, then asked on decode twice: the first answer comes
from the store, the second from decode's own prefix cache. All contenders in one run, medians of
several prompts, page cache warm. The yardstick is the bytes over the machine's memory bandwidth.

    python benchmarks/handoff.py [--repeats 5] [--tokens 3500] [--only ucm-dram,fs]
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.cluster.models import make_model
from examples.cluster.processes import MIB, VllmServer, end_run, run_folder, ucm_connector

BLOCK_TOKENS = 128
KV_BYTES_PER_TOKEN = 32 << 10  # the mid model in bfloat16
SETTLE_S = 1.5
# Small, so that the first prompts, which are not timed, touch all of it: a load into fresh memory
# would measure the kernel's page faults.
KV_CACHE_BYTES = 256 * MIB
NUM_WARM_UP = 3
VOCABULARY = 300


@dataclass(frozen=True)
class Contender:
    """`prefill` and `decode` are --kv-transfer-config; `pythonpath` lets vLLM import a spec."""

    name: str
    what: str
    prefill: Mapping[str, Any]
    decode: Mapping[str, Any]
    pythonpath: Path | None = None


@dataclass(frozen=True)
class Sample:
    store_s: float
    local_s: float
    external_tokens: int
    same_tokens: bool


def contenders(store: Path) -> list[Contender]:
    def ucm(directory: str, socket: str) -> dict[str, Any]:
        settings = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(store / directory),
            "cache_buffer_capacity_gb": 1,
            "node_cache_idle_exit_s": 5,
            "node_cache_socket": str(run_folder() / f"{socket}.sock"),
        }
        entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": settings}
        return ucm_connector({"ucm_connectors": [entry]})

    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store / "example")},
    }
    tiering = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_tiering",
            "cpu_bytes_to_use": 1 << 30,
            "secondary_tiers": [{"type": "fs", "root_dir": str(store / "fs")}],
        },
    }
    peers = Path(__file__).with_name("peers")
    return [
        Contender(
            "ucm-dram",
            "UCM, one node: prefill's pages are in the node cache",
            ucm("dram", "one"),
            ucm("dram", "one"),
        ),
        Contender(
            "ucm-files",
            "UCM, two nodes: decode's node cache reads files",
            ucm("files", "left"),
            ucm("files", "right"),
        ),
        Contender("example", "vLLM's ExampleConnector", example, example),
        Contender("fs", "vLLM's fs tier, copy worker for CPU", tiering, tiering, peers),
    ]


def measure(
    contender: Contender, model: Path, store: Path, args: argparse.Namespace
) -> list[Sample]:
    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_bytes": KV_CACHE_BYTES,
        "args": ["--max-num-batched-tokens", "4096"],
        "env": {"PYTHONPATH": str(contender.pythonpath)} if contender.pythonpath else {},
    }
    logs = store / "logs"
    with (
        VllmServer(
            model, kv_transfer=contender.prefill, log=logs / f"{contender.name}-p.log", **common
        ) as prefill,
        VllmServer(
            model, kv_transfer=contender.decode, log=logs / f"{contender.name}-d.log", **common
        ) as decode,
    ):
        prefill.wait_ready()
        decode.wait_ready()
        rng = random.Random(0)
        samples = []
        for repeat in range(NUM_WARM_UP + args.repeats):
            prompt = [rng.randrange(VOCABULARY) for _ in range(args.tokens)]
            prefill.client.complete(prompt, max_tokens=1)
            time.sleep(SETTLE_S)
            before = decode.client.counters()
            hit = decode.client.complete(prompt, max_tokens=8)
            external = (decode.client.counters() - before).external_hits
            local = decode.client.complete(prompt, max_tokens=8)
            if repeat >= NUM_WARM_UP:
                same = hit.token_ids == local.token_ids
                samples.append(Sample(hit.ttft_s, local.ttft_s, external, same))
        return samples


def memory_bandwidth() -> float:
    """Bytes per second of one thread that copies memory."""
    source = np.ones(64 * MIB, dtype=np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)
    started_s = time.perf_counter()
    for _ in range(5):
        np.copyto(target, source)
    return 5 * source.nbytes / (time.perf_counter() - started_s)


def row(contender: Contender, samples: list[Sample], expected: int) -> list[str]:
    overheads_ms = sorted((s.store_s - s.local_s) * 1000 for s in samples)
    note = "" if all(s.external_tokens == expected for s in samples) else "not all from the store"
    if not all(s.same_tokens for s in samples):
        note = f"{note} tokens differ from the local hit".strip()
    return [
        contender.name,
        f"{statistics.median(s.store_s for s in samples) * 1000:.0f}",
        f"{statistics.median(s.local_s for s in samples) * 1000:.0f}",
        f"{statistics.median(overheads_ms):.1f}",
        f"{overheads_ms[0]:.1f} - {overheads_ms[-1]:.1f}",
        note or contender.what,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3500)
    parser.add_argument("--only", default="", help="names of contenders, separated by commas")
    args = parser.parse_args()
    console = Console()
    store = Path(tempfile.mkdtemp(prefix="ucm-bench-"))
    expected = args.tokens // BLOCK_TOKENS * BLOCK_TOKENS
    table = Table(title="decode's TTFT on a store hit, over its own prefix hit (ms, medians)")
    for column in ("contender", "store hit", "local hit", "overhead", "range", ""):
        table.add_column(column)
    try:
        model = make_model(store / "model", size="mid")
        chosen = [c for c in contenders(store) if not args.only or c.name in args.only.split(",")]
        for contender in chosen:
            console.print(f"{contender.name}: starting two servers")
            table.add_row(*row(contender, measure(contender, model, store, args), expected))
            end_run()
    finally:
        shutil.rmtree(store, ignore_errors=True)
    megabytes = expected * KV_BYTES_PER_TOKEN / 1e6
    console.print(table)
    console.print(
        f"{expected} tokens, {megabytes:.0f} MB: one thread copies that in "
        f"{megabytes * 1e9 / memory_bandwidth():.1f} ms"
    )


if __name__ == "__main__":
    main()
