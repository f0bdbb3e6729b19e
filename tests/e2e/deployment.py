"""Real vLLM servers over one store: how tests start them, share them, and know the right answer."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from examples.cluster.client import Client
from examples.cluster.processes import MIB, VllmServer, ucm_connector
from tests.e2e.node import Node, engine_sessions
from tests.e2e.store import BLOCK_TOKENS, Store
from ucm.store.node.protocol import Status

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_TOKENS = 16
KV_CACHE_BYTES = 128 * MIB
_Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """A vLLM server with UCM."""

    name: str
    server: VllmServer
    node: Node
    layerwise: bool

    @property
    def client(self) -> Client:
        return self.server.client

    def full_hit_tokens(self, prompt: Sequence[int]) -> int:
        """What it reports to have loaded when all full blocks were in the store. Layer by layer, a
        step must compute one token of its own."""
        full = len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
        return min(full, len(prompt) - 1) if self.layerwise else full

    def handed_over_tokens(self, prompt: Sequence[int]) -> int:
        """The same after a hand-off, which includes the tail."""
        return len(prompt) - self.layerwise


class Deployment:
    """Servers that share one store; those with one Node share a node cache. They start in
    parallel: `start` returns at once, `wait_ready` waits for all."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store", "float32")
        self.engines: dict[str, Engine] = {}
        self._model = model
        self._makers: dict[str, Callable[..., VllmServer]] = {}

    def __getitem__(self, name: str) -> Engine:
        return self.engines[name]

    def settings(self, node: Node, **top: Any) -> dict[str, Any]:
        store = {"store_pipeline": "Cache|Posix", "storage_backends": str(self.store.folder)}
        connector = {
            "ucm_connector_name": "UcmPipelineStore",
            "ucm_connector_config": {**store, **node.settings()},
        }
        # How much of a hit is loaded must not depend on how busy the machine of the tests is.
        return {"ucm_connectors": [connector], "load_policy": "always", **top}

    def start(
        self,
        name: str,
        node: Node,
        *,
        layerwise: bool = False,
        chunk: int | None = None,
        block_size: int = 128,
        role: str = "kv_both",
        prefix_caching: bool = False,
        kv_cache_bytes: int = KV_CACHE_BYTES,
        dtype: str = "float32",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        wrap: Callable[[dict[str, Any]], dict[str, Any]] = lambda connector: connector,
        **top: Any,
    ) -> Engine:
        """`top` are further settings of the top level; `wrap` makes vLLM's kv_transfer_config of
        our connector's part of it."""
        # JSON is YAML.
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps(self.settings(node, use_layerwise=layerwise, **top)))
        flags = [] if prefix_caching else ["--no-enable-prefix-caching"]
        flags += [] if chunk is None else ["--max-num-batched-tokens", str(chunk)]
        self._makers[name] = partial(
            VllmServer,
            self._model,
            log=self.folder / f"{name}.log",
            kv_transfer=wrap(ucm_connector(config, kv_role=role)),
            dtype=dtype,
            block_size=block_size,
            kv_cache_bytes=kv_cache_bytes,
            args=[*flags, *args],
            env=env,
            launcher=launcher,
        )
        engine = Engine(name, self._makers[name](), node, layerwise)
        self.engines[name] = engine
        return engine

    def start_again(self, name: str) -> None:
        """Where it was, after it has been killed."""
        old = self.engines[name]
        server = self._makers[name](port=old.server.port)
        self.engines[name] = replace(old, server=server)

    def wait_ready(self) -> None:
        for engine in self.engines.values():
            engine.server.wait_ready()
        # An engine serves without its node cache until that is there.
        for node, num_engines in Counter(engine.node for engine in self.engines.values()).items():
            node.wait("known to its engines", partial(_has_connected, num_engines=num_engines))

    def kill(self) -> None:
        """Ends all servers. Node caches leave by themselves."""
        for engine in self.engines.values():
            engine.server.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def _has_connected(status: Status, *, num_engines: int) -> bool:
    """Their scheduler sides, and a rank of each."""
    connected = [each["connections"] > 1 for each in engine_sessions(status).values()]
    return sum(connected) >= num_engines


class Oracle:
    """A plain vLLM in float32 that computes every prompt cold, and remembers its answers."""

    def __init__(self, model: Path, folder: Path) -> None:
        args = ["--no-enable-prefix-caching"]
        self.server = VllmServer(
            model, log=folder / "oracle.log", args=args, kv_cache_bytes=KV_CACHE_BYTES
        )
        self._answers: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def answer(self, prompt: Sequence[int], *, max_tokens: int = MAX_TOKENS) -> tuple[int, ...]:
        key = (max_tokens, tuple(prompt))
        with self._lock:
            known = self._answers.get(key)
        if known is None:
            known = self.server.client.complete(prompt, max_tokens=max_tokens).token_ids
            with self._lock:
                self._answers[key] = known
        return known

    def answers(
        self, prompts: Sequence[_Prompt], *, max_tokens: int = MAX_TOKENS
    ) -> dict[_Prompt, tuple[int, ...]]:
        """To many prompts, several at once."""
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(partial(self.answer, max_tokens=max_tokens), prompts)
            return dict(zip(prompts, found, strict=True))


class Fleets:
    """One deployment at a time, kept from test to test until another one is asked for."""

    def __init__(self) -> None:
        self._name = ""
        self._deployment: Deployment | None = None
        self._failed: set[str] = set()

    def use(self, name: str, start: Callable[[], Deployment]) -> Deployment:
        assert name not in self._failed, f"the servers of {name} did not start for an earlier test"
        if self._deployment is None or self._name != name:
            self.end()
            self._failed.add(name)
            deployment = start()
            self._name, self._deployment = name, deployment
            deployment.wait_ready()
            self._failed.discard(name)
        return self._deployment

    def end(self) -> None:
        if self._deployment is not None:
            self._deployment.kill()
            self._deployment = None
