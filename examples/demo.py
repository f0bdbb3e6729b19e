"""Prefill fills a directory, decode loads from it: on this machine, in a few minutes.

Starts a prefill server, a decode server and the proxy with a directory between them, and a plain
vLLM to compare with; sends a handful of prompts; prints what decode loaded and what lies in the
store. Ends with 1 if an answer differs from plain vLLM's, or a prompt was computed twice.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.cluster.client import Answer, Client
from examples.cluster.models import make_model
from examples.cluster.processes import (
    MIB,
    HttpServer,
    ProxyServer,
    ServerFailed,
    VllmServer,
    end_run,
    run_folder,
    ucm_connector,
)
from examples.demo_tables import BLOCK_TOKENS, Outcome, outcome_table, store_table

PREFILL_CHUNK_TOKENS = 1024
MAX_TOKENS = 16
SHARED_TOKENS = 6 * BLOCK_TOKENS

CHAT = "A page that one machine has computed need not be computed by another machine again. "

SETTINGS = """\
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "{store}"
      cache_buffer_capacity_gb: 0.5
      min_free_gb: 0                       # a demo may use a disk that is nearly full
      node_cache_idle_exit_s: 5
      node_cache_socket: "{socket}"
enable_event_sync: true
use_layerwise: false
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt. `ask` sends it to whatever client it is given."""

    name: str
    ask: Callable[[Client], Answer]
    through_proxy: bool = True


@dataclass(frozen=True, kw_only=True)
class Device:
    """How a server gets its share of this machine."""

    kv_cache_bytes: int
    args: Sequence[str] = ()
    launcher: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    prefill: VllmServer
    decode: VllmServer
    plain: VllmServer
    proxy: ProxyServer


def main() -> int:
    args = _parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    console = Console()
    started_at = time.monotonic()
    folder = run_folder()
    store = folder / "store"
    try:
        model = args.model or _made_model(console, folder)
        with _cluster(console, model, folder=folder, store=store) as cluster:
            outcomes = list(_run(console, cluster, _cases()))
            console.print(outcome_table(outcomes))
            console.print(store_table(store))
    except ServerFailed as error:
        console.print(f"[red]a server failed:[/red] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        end_run()
    bad = [outcome.name for outcome in outcomes if not outcome.is_good]
    console.print(f"{time.monotonic() - started_at:.0f} s in all; nothing is left running.")
    if bad:
        console.print(f"[red]not as it should be: {', '.join(bad)}[/red]")
    return 1 if bad else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a model of your own instead of a small one made on the spot; served in float32, "
        "where a prompt gives the same tokens in whatever pieces it is computed",
    )
    args = parser.parse_args()
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in it")
    return args


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _made_model(console: Console, folder: Path) -> Path:
    with console.status("making a small model"):
        model = make_model(folder / "models", "small")
    console.print(f"made a model with random weights in {model}", highlight=False)
    return model


@contextmanager
def _cluster(console: Console, model: Path, *, folder: Path, store: Path) -> Iterator[Cluster]:
    store.mkdir()
    settings = folder / "ucm.yaml"
    settings.write_text(SETTINGS.format(store=store, socket=folder / "node.sock"))
    connector = ucm_connector(settings)
    gpus = _gpus()
    # Decode and plain vLLM compute or load every prompt anew: that is what is compared here.
    anew = ("--no-enable-prefix-caching",)
    chunked = ("--max-num-batched-tokens", str(PREFILL_CHUNK_TOKENS))
    with ExitStack() as stack:

        def vllm(name: str, index: int, args: Sequence[str], *, with_ucm: bool) -> VllmServer:
            device = _device(gpus, index, is_made_model=folder in model.parents)
            server = VllmServer(
                model,
                log=folder / f"{name}.log",
                kv_transfer=connector if with_ucm else None,
                kv_cache_bytes=device.kv_cache_bytes,
                args=(*args, *device.args),
                launcher=device.launcher,
                env=device.env,
            )
            return stack.enter_context(server)

        prefill = vllm("prefill", 0, chunked, with_ucm=True)
        decode = vllm("decode", 1, anew, with_ucm=True)
        plain = vllm("plain", 2, anew, with_ucm=False)
        _show_start(console, {"prefill": prefill, "decode": decode, "plain vLLM": plain})
        proxy = stack.enter_context(ProxyServer(prefill, decode, log=folder / "proxy.log"))
        proxy.wait_ready()
        yield Cluster(prefill=prefill, decode=decode, plain=plain, proxy=proxy)


def _gpus() -> int:
    """GPUs that a `vllm` command on the PATH can use; 0 means vLLM's CPU build."""
    if not (shutil.which("nvidia-smi") and shutil.which("vllm")):
        return 0
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
    )
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _device(gpus: int, index: int, *, is_made_model: bool) -> Device:
    if not gpus:
        return Device(kv_cache_bytes=(256 if is_made_model else 2048) * MIB)
    return Device(
        # A size, not a share of the memory: three servers may have to fit on one GPU.
        kv_cache_bytes=4096 * MIB,
        args=("--gpu-memory-utilization", "0.1"),
        launcher=("vllm", "serve"),
        env={
            "CUDA_VISIBLE_DEVICES": str(index % gpus),
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        },
    )


def _show_start(console: Console, servers: dict[str, VllmServer]) -> None:
    ready_s: dict[str, float] = {}

    def progress() -> Table:
        table = Table.grid(padding=(0, 2))
        for name, server in servers.items():
            waited_s = time.monotonic() - server.started_at
            state = f"ready after {ready_s[name]:.0f} s" if name in ready_s else "starting"
            table.add_row(name, state if name in ready_s else f"{state} {waited_s:.0f} s")
        return table

    console.print("starting prefill, decode, and a plain vLLM to compare with")
    with Live(progress(), console=console, refresh_per_second=4) as live:
        for name, server in servers.items():
            ready_s[name] = server.wait_ready(on_wait=lambda: live.update(progress()))
            live.update(progress())
    console.print()


def _cases() -> list[Case]:
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 256) for _ in range(count)]

    def completion(name: str, prompt: list[int], *, through_proxy: bool = True) -> Case:
        def ask(client: Client) -> Answer:
            return client.complete(prompt, max_tokens=MAX_TOKENS)

        return Case(name=name, ask=ask, through_proxy=through_proxy)

    shared = tokens(SHARED_TOKENS)
    return [
        completion("one token", tokens(1)),
        completion("under a block", tokens(100)),
        completion("several blocks", tokens(700)),
        completion("over a prefill chunk", tokens(3500)),
        completion("prefix of 768, and more", shared + tokens(300)),
        completion("same prefix, decode alone", shared + tokens(200), through_proxy=False),
        Case(name="chat", ask=lambda client: client.chat(CHAT * 20, max_tokens=MAX_TOKENS)),
    ]


def _run(console: Console, cluster: Cluster, cases: Sequence[Case]) -> Iterator[Outcome]:
    for server in (cluster.prefill, cluster.decode, cluster.plain):
        # The first request of a server pays for things that no later one does.
        server.client.complete([1, 2, 3], max_tokens=2)
    for case in cases:
        with console.status(f"asking: {case.name}"):
            yield _run_case(cluster, case)


def _run_case(cluster: Cluster, case: Case) -> Outcome:
    plain = case.ask(cluster.plain.client)
    before = cluster.decode.client.counters()
    server: HttpServer = cluster.proxy if case.through_proxy else cluster.decode
    answer = case.ask(server.client)
    loaded = cluster.decode.client.counters() - before
    # Once more, at decode itself: through the proxy the first token has waited for prefill, too.
    again = case.ask(cluster.decode.client)
    promised = SHARED_TOKENS
    if case.through_proxy:
        # Shorter ones are not worth a prefill of their own.
        promised = answer.prompt_tokens if answer.prompt_tokens >= BLOCK_TOKENS else 0
    return Outcome(
        name=case.name,
        prompt_tokens=answer.prompt_tokens,
        promised_tokens=promised,
        loaded_tokens=loaded.external_hits,
        cold_ttft_s=plain.ttft_s,
        loaded_ttft_s=again.ttft_s,
        is_same=plain.token_ids == answer.token_ids == again.token_ids,
    )


if __name__ == "__main__":
    sys.exit(main())
