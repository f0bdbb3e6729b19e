"""Engines of several versions of vLLM, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.processes import MIB, VLLM_ENVIRONMENT
from tests.e2e.engine_process import ANSWER
from tests.source import ROOT

# What `make` installs beside the version that the other tests run on: vLLM alone, without what it
# needs, which is the same.
OTHERS = Path(sys.prefix) / "versions"
# What was built for another torch finds it here.
OLD_TORCH = OTHERS / "torch-2.11.0"
# Over the kernels of the version of the other tests.
PYTHON_ALONE = ("0.33.0",)
NEEDS_OLD_TORCH = ("0.23.", "0.24.", "0.25.", "0.26.")
SCRIPT = ROOT / "tests" / "e2e" / "engine_process.py"
# Of 128 tokens. One is vLLM's own.
NUM_BLOCKS = 20


def environment_of(version: str) -> dict[str, str]:
    """With it an interpreter imports that vLLM, and this UCM."""
    places = [OTHERS / version] if version else []
    if version.startswith(NEEDS_OLD_TORCH):
        places.append(OLD_TORCH)
    # What was built for CUDA would look for it.
    device = {"VLLM_TARGET_DEVICE": "cpu"} if version in PYTHON_ALONE else {}
    return {"PYTHONPATH": os.pathsep.join(map(str, [*places, ROOT])), **device}


def fail_without(versions: Sequence[str]) -> None:
    missing = [each for each in versions if each and not (OTHERS / each / "vllm").is_dir()]
    if missing:
        pytest.fail(f"vLLM {', '.join(missing)} is not installed: `make test-versions` does it")


class EngineProcess:
    """Starts at once; the first question waits until it is there. `version`: empty is that of the
    other tests. `plugin`: a module for it to begin with. `more` are further flags."""

    def __init__(
        self,
        version: str,
        model: Path,
        log: Path,
        kv_transfer: dict[str, Any] | None = None,
        *,
        plugin: str = "",
        **more: Any,
    ) -> None:
        self.version = version
        self._log = log
        flags = {
            "model": str(model),
            "dtype": "float32",
            "block_size": 128,
            "max_model_len": 2048,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 512,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 16 * MIB,
            "num_gpu_blocks_override": NUM_BLOCKS,
            "disable_log_stats": False,
            **more,
        }
        if kv_transfer is not None:
            flags["kv_transfer_config"] = kv_transfer
        environment = {
            **os.environ,
            **VLLM_ENVIRONMENT,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **environment_of(version),
        }
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), json.dumps(flags), *([plugin] if plugin else [])],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __str__(self) -> str:
        return f"vLLM {self.version or 'of the tests'}"

    def __call__(self, what: str, *arguments: object) -> Any:
        """The test's own limit bounds how long it takes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([what, arguments]) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        end = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
        raise AssertionError(f"{self} has ended:\n{end}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
