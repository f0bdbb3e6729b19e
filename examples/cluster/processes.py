"""Real servers for demo, tests and benchmarks: started, watched, and never left behind.

    with VllmServer(model, kv_transfer=ucm_connector("ucm.yaml"), log=logs / "a.log") as prefill:
        prefill.wait_ready()
        prefill.client.complete([1, 2, 3])

Each server runs under a guard (guard.py) that kills it when this process ends, however it ends.
Several servers start in parallel when all are constructed before the first `wait_ready`.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from examples.cluster import guard
from examples.cluster.client import Client

if TYPE_CHECKING:
    from typing_extensions import Self

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240.0
MIB = 1 << 20

_LOG_TAIL_LINES = 25
_MAX_RESERVED = 64
# Bound, and nobody listens on them.
_reserved: deque[socket.socket] = deque()

# Quiet, offline, and servers that share two cores do not fight: vLLM's own choice pins all of them
# to the same core, and two OpenMP threads per server spin against each other (up to 20 times slower
# as soon as somebody else works too).
VLLM_ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerFailed(Exception):
    """A server ended, or did not answer in time; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on. The kernel gives it to nobody
    who asks for any port until a server, which as all of them shares addresses, has it, or many
    more were asked for."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    if len(_reserved) == _MAX_RESERVED:
        _reserved.popleft().close()
    _reserved.append(probe)
    port: int = probe.getsockname()[1]
    return port


@cache
def run_folder() -> Path:
    """The temporary folder of all servers of this process (vLLM leaves sockets and files in it).

    It goes when this process ends, killed or not, and with it every process that it was given to,
    idle node caches included. Its path is short, because Unix sockets are made under it.
    """
    folder = Path(tempfile.mkdtemp(prefix="ucm-"))
    atexit.register(guard.end_run, str(folder))
    return folder


def run_processes() -> set[int]:
    """Processes that servers of this process have started, directly or not, and that still live."""
    return guard.run_processes(str(run_folder()))


def end_run() -> None:
    """Kill what is left of this process's servers, such as node caches that would idle a while."""
    guard.end_run(str(run_folder()))
    run_folder().mkdir(exist_ok=True)


class GuardedProcess:
    """One command under a guard, its output in `log`. Thread-safe only for `is_running`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        folder = str(run_folder())
        marks = {"TMPDIR": folder, guard.RUN_VARIABLE: folder}
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {}), **marks},
                cwd=cwd or REPOSITORY,
            )
        self.started_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An interrupted or failed caller wants out, not a graceful end.
        self.stop() if kind is None else self.kill()

    @property
    def is_running(self) -> bool:
        return self._guard.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative signals appear as 128 + signal, as in a shell."""
        return self._guard.poll()

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The command and its descendants, the command first; only those with `name` in their
        command line (vLLM's are called VLLM::EngineCore and VLLM::Worker)."""
        try:
            family = psutil.Process(self._guard.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in family if name in _command_line(process)]

    def send_signal(self, number: signal.Signals, *, name: str = "") -> None:
        """Signal the processes with `name` in their command line, or just the command itself."""
        family = self.processes(name)
        for process in family if name else family[:1]:
            process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Wait until the command has ended by itself; return its exit code."""
        try:
            return self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            message = f"still running after {timeout_s:.0f} s: {self.command[0]}"
            raise ServerFailed(f"{message}\n{self.log_tail()}") from None

    def stop(self) -> None:
        """Ask it to end, and kill it if it takes too long. Harmless on one that has ended."""
        if self.is_running:
            self._guard.terminate()
        self._finish()

    def kill(self) -> None:
        """End it like kill -9 would: the command and all of its process group."""
        self._finish(word=b"k")

    def _finish(self, *, word: bytes = b"") -> None:
        stdin = self._guard.stdin
        assert stdin is not None
        if not stdin.closed and word:
            try:
                stdin.write(word)
                stdin.flush()
            except BrokenPipeError:
                pass
        # The pipe stays open until the guard has gone: closing it means that this process died.
        self._guard.wait(guard.STOP_TIMEOUT_S + 10.0)
        try:
            stdin.close()
        except BrokenPipeError:
            pass

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self) -> str:
        tail = self.log_text().splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([f"--- end of {self.log}:", *tail])


class HttpServer(GuardedProcess):
    """A guarded process that answers GET `health_path` with 200 once it is ready."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        health_path: str = "/health",
    ) -> None:
        self.port = port
        self.health_path = health_path
        self.client = Client("127.0.0.1", port)
        super().__init__(command, log=log, env=env, cwd=cwd)

    def wait_ready(
        self, timeout_s: float = START_TIMEOUT_S, *, on_wait: Callable[[], None] | None = None
    ) -> float:
        """Wait for the first healthy answer; return the seconds since the start."""
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            if not self.is_running:
                raise ServerFailed(f"ended with {self.exit_code} at start\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"not ready after {timeout_s:.0f} s\n{self.log_tail()}")
            if on_wait is not None:
                on_wait()
            time.sleep(0.1)
        return time.monotonic() - self.started_at

    def answers(self) -> bool:
        """Whether it is healthy now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", self.health_path)
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class VllmServer(HttpServer):
    """A real vLLM server. `args` are further flags of `vllm serve`.

    `kv_cache_bytes` is for the CPU build, where a small cache also starts seconds faster (vLLM
    writes zeros over all of it); on a GPU pass None and choose the memory share in `args`.
    """

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        port: int | None = None,
        kv_transfer: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        block_size: int = 128,
        max_model_len: int = 4096,
        kv_cache_bytes: int | None = 256 * MIB,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        port = port or free_port()
        command = [*(launcher or python_launcher()), str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
        command += ["--block-size", str(block_size), "--max-model-len", str(max_model_len)]
        command += ["--max-num-seqs", "16", "--enforce-eager", "--disable-uvicorn-access-log"]
        if kv_cache_bytes is not None:
            command += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
        if kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(kv_transfer)]
        environment = {**VLLM_ENVIRONMENT, **(env or {})}
        self._needs_a_first_prompt = dtype == "bfloat16" and kv_cache_bytes is not None
        super().__init__([*command, *args], port=port, log=log, env=environment)

    def wait_ready(
        self, timeout_s: float = START_TIMEOUT_S, *, on_wait: Callable[[], None] | None = None
    ) -> float:
        """As `HttpServer.wait_ready`. On processors with AMX, vLLM 0.32's CPU build without
        compilation dies of an illegal instruction in bfloat16 if the first step it computes has
        one token, as a hit's has: its attention uses tiles that the kernel grants to a process
        only once oneDNN, which a longer step calls, has asked for them. Too short to be stored."""
        started_s = super().wait_ready(timeout_s, on_wait=on_wait)
        if self._needs_a_first_prompt:
            self.client.complete([7] * 100, max_tokens=1)
        return started_s


def python_launcher() -> list[str]:
    """How vLLM's server starts from this interpreter; the model's folder comes next."""
    return [sys.executable, str(Path(__file__).with_name("serve_vllm.py")), "--model"]


def ucm_connector(config: Path | str | Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The --kv-transfer-config of the README, with a settings file or the same tree inline."""
    is_file = isinstance(config, Path | str)
    return {
        "kv_connector": "UCMConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
        "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(config)} if is_file else config,
        **fields,
    }


class ProxyServer(HttpServer):
    """The PD proxy between prefill and decode servers of this machine. `args` are further flags."""

    def __init__(
        self,
        prefill: HttpServer,
        decode: HttpServer,
        *,
        log: Path,
        port: int | None = None,
        args: Sequence[str] = (),
    ) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", "--pd-disaggregation"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--prefiller-host", "127.0.0.1", "--prefiller-port", str(prefill.port)]
        command += ["--decoder-host", "127.0.0.1", "--decoder-port", str(decode.port)]
        super().__init__([*command, *args], port=port, log=log)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
