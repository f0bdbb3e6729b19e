"""The command lines of the documents, typed as they stand."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.cluster.processes import HttpServer, free_port
from tests.pd.conftest import Bench
from ucm.pd import toy_proxy_server

FOLDER = Path(toy_proxy_server.__file__).parent
PATIENCE_S = 30.0


class _Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"max_tokens": fields["max_tokens"]})

    def _answer(self, fields: dict[str, object]) -> None:
        body = json.dumps(fields).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def _seed_command(port: int, engine_port: int) -> list[str]:
    return [
        *["--pd-disaggregation", "--host", "localhost", "--port", str(port)],
        *["--prefiller-host", "127.0.0.1", "--prefiller-port", str(engine_port)],
        *["--decoder-host", "127.0.0.1", "--decoder-port", str(engine_port)],
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("start", "cwd"),
    [
        pytest.param(["toy_proxy_server.py"], FOLDER, id="as-a-script-in-its-own-folder"),
        pytest.param(["-m", "ucm.pd.toy_proxy_server"], None, id="as-a-module"),
        pytest.param(["-m", "ucm.cli.main", "proxy"], None, id="as-a-subcommand"),
        pytest.param(["-m", "ucm.cli.main", "proxy", "--loop=uvloop"], None, id="on-uvloop"),
    ],
)
def test_the_1p1d_command_serves(tmp_path: Path, engine_port: int, start: list[str], cwd):
    port = free_port()
    command = [sys.executable, *start, *_seed_command(port, engine_port)]
    with HttpServer(command, port=port, log=tmp_path / "log", cwd=cwd) as proxy:
        proxy.wait_ready(PATIENCE_S)

        status, body = proxy.client.post("/v1/completions", {"prompt": "hi", "max_tokens": 20})

        assert (200, {"max_tokens": 20}) == (status, json.loads(body))
        proxy.send_signal(signal.SIGTERM)
        assert 0 == proxy.wait(PATIENCE_S)


@pytest.mark.process
async def test_a_client_that_leaves_cancels_the_request_upstream(tmp_path: Path, bench: Bench):
    """The engine would go on generating for nobody; aiohttp lets handlers run on unless told."""
    bench.decode.answer = bench.decode.never
    port = free_port()
    ports = ["--prefiller-port", str(bench.prefill.url.port)]
    ports += ["--decoder-port", str(bench.decode.url.port), "--port", str(port)]
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", *ports]
    with HttpServer(command, port=port, log=tmp_path / "log", health_path="/healthcheck") as proxy:
        await asyncio.to_thread(proxy.wait_ready, PATIENCE_S)
        url = f"http://localhost:{port}/v1/completions"
        request = asyncio.create_task(bench.client.post(url, json={"prompt": "hi"}))
        await bench.decode.started.wait()

        request.cancel()

        await asyncio.wait_for(bench.decode.cancelled.wait(), PATIENCE_S)


@pytest.mark.process
def test_the_script_needs_neither_vllm_nor_an_installed_ucm():
    """The proxy's machine may have a plain Python with a few packages, and a checkout."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('vllm', 'torch', 'numpy')))\n"
        f"sys.path[0] = {str(FOLDER)!r}; sys.argv = ['toy_proxy_server.py', '--help']\n"
        "import runpy; runpy.run_path('toy_proxy_server.py', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": ""}

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert (0, "") == (done.returncode, done.stderr)
    assert "--prefiller-host" in done.stdout


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "78.0"])
def test_a_port_that_is_none_is_refused_with_one_line(capsys, port):
    with pytest.raises(SystemExit) as stopped:
        toy_proxy_server.main([f"--port={port}"])

    assert 2 == stopped.value.code
    assert f"{port!r} is no port" in capsys.readouterr().err.splitlines()[-1]


def test_a_loop_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(SystemExit) as stopped:
        toy_proxy_server.main(["--loop=uvloop"])

    assert 2 == stopped.value.code
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "--loop uvloop needs the package uvloop: pip install 'ucm[uvloop]'" in line
