"""What an import of the connector does to the vLLM that this interpreter has, told on standard
output as JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from types import ModuleType
from typing import Any

# What vLLM has imported by the time that it asks for its connector, and of what a patch would be
# made.
_BEFORE = (
    "vllm.config",
    "vllm.distributed.kv_transfer.kv_connector.factory",
    "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.kv_connector_model_runner_mixin",
)


def picture() -> dict[str, Any]:
    """Every name in a module or a class of vLLM, with what it stands for; of what holds something,
    how much."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm":
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}:{key}"] = (id(value), _size(value))
            if isinstance(value, type) and value.__module__ == name:
                for inner, of_class in list(vars(value).items()):
                    found[f"{name}:{key}.{inner}"] = (id(of_class), _size(of_class))
    return found


def _size(value: object) -> int:
    return len(value) if isinstance(value, (dict, list, set)) else 0


def is_module(place: str) -> bool:
    module, _, key = place.partition(":")
    return isinstance(vars(sys.modules[module]).get(key), ModuleType)


def running() -> dict[str, list[str]]:
    return {
        "threads": sorted(each.name for each in threading.enumerate()),
        "files": sorted(os.listdir("/proc/self/fd")),
        "environment": sorted(f"{name}={value}" for name, value in os.environ.items()),
    }


def main() -> None:
    importlib.import_module("ucm.integration.vllm")
    loaded = sorted({"vllm", "torch"} & sys.modules.keys())
    for name in _BEFORE:
        importlib.import_module(name)
    factory: Any = sys.modules[_BEFORE[1]]
    registry = factory.KVConnectorFactory._registry
    known, before, was_running = set(registry), picture(), running()
    modules = set(sys.modules)
    importlib.import_module("ucm.integration.vllm.ucm_connector")
    after = picture()
    told = {
        "loaded by the package": loaded,
        "registered": sorted(registry.keys() - known),
        "changed": [
            place
            for place in sorted(before.keys() | after.keys())
            if place.partition(":")[0] in modules
            and before.get(place) != after.get(place)
            and not place.endswith(":KVConnectorFactory._registry")
            and not (place not in before and is_module(place))
        ],
        "started": [what for what, now in running().items() if now != was_running[what]],
        "seen": len(before),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
