"""An example of a deployment as plain processes of this machine: its own commands, environment and
settings, with its paths, ports and hosts mapped. vLLM's CPU build is told a size for its cache, and
the node cache gets less memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from examples.cluster.processes import (
    MIB,
    VLLM_ENVIRONMENT,
    GuardedProcess,
    HttpServer,
    free_port,
    python_launcher,
    run_folder,
)
from examples.cluster.serve_vllm import FORK_VARIABLE
from tests.examples.deploy.files import Command
from tests.store.node.support import ROOT, SOON_S, wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

NODE_CACHE = "node-cache"
ROLES = ("prefill", "decode")
CAPACITY = ("cache_buffer_capacity_gb: 32", "cache_buffer_capacity_gb: 0.0625")
# What a CPU needs, and no prefix cache: what is loaded comes from the store.
ON_CPU = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", str(128 * MIB), "--no-enable-prefix-caching"),
)


class Local:
    """`commands`: by service. `files`: those that they read, by their path in the example.
    `places`: what else stands for something else here; the longest first."""

    def __init__(
        self,
        commands: Mapping[str, Command],
        files: Mapping[str, Path],
        places: Mapping[str, str],
        ports: Mapping[str, int],
    ) -> None:
        self.folder = run_folder() / "deployed"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.ports = ports
        self._commands = commands
        self._places = {"/run/ucm": str(self.folder / "run"), **places}
        for name in files:
            self._places[name] = str(self.folder / Path(name).name)
        for name, source in files.items():
            text = self.mapped(source.read_text().replace(*CAPACITY))
            (self.folder / Path(name).name).write_text(text)
        self.processes: dict[str, GuardedProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.kill()

    def mapped(self, text: str) -> str:
        for name in sorted(self._places, key=len, reverse=True):
            text = text.replace(name, self._places[name])
        return text

    def argv(self, name: str, command: Command) -> list[str]:
        port = self.ports.get(name)
        flags = [self.mapped(flag) for flag in command.flags]
        for number in ("8000", "7800", "7801"):
            flags = [f"--port={port}" if flag == f"--port={number}" else flag for flag in flags]
            flags = [
                str(port) if flag == number and before == "--port" else flag
                for before, flag in zip(["", *flags], flags, strict=False)
            ]
            flags = [flag.replace(f":{number}/", f":{port}/") for flag in flags]
        if command.program == ("vllm", "serve"):
            return [*python_launcher(), *flags, *ON_CPU]
        if command.program[0] == "ucm":
            return [sys.executable, "-m", "ucm.cli.main", command.program[1], *flags]
        assert command.program == ("python3",)
        return [sys.executable, *flags]

    def start(self, name: str) -> None:
        """Also one that has ended."""
        if name in self.processes:
            self.processes[name].stop()
        command = self._commands[name]
        more = VLLM_ENVIRONMENT | {FORK_VARIABLE: "1"} if name in ROLES else {}
        environment = {**command.environment, **more}
        log = self.folder / f"{name}.log"
        argv = self.argv(name, command)
        if name in self.ports:
            made: GuardedProcess = HttpServer(argv, port=self.ports[name], log=log, env=environment)
        else:
            made = GuardedProcess(argv, log=log, env=environment)
        self.processes[name] = made

    def server(self, name: str) -> HttpServer:
        found = self.processes[name]
        assert isinstance(found, HttpServer)
        return found

    def is_well(self, name: str, check: Command) -> bool:
        """By its example's own health check."""
        done = subprocess.run(
            self.argv(name, check), cwd=ROOT, env=dict(os.environ), capture_output=True, timeout=60
        )
        return done.returncode == 0

    def wait_well(self, name: str, check: Command) -> None:
        def is_well() -> bool:
            process = self.processes[name]
            assert process.is_running, process.log_tail()
            return self.is_well(name, check)

        wait_until(is_well, f"{name} is well", within_s=SOON_S)


def free_ports() -> dict[str, int]:
    return {name: free_port() for name in (*ROLES, "proxy")}
