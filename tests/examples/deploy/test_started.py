"""What examples of deployments start serves: decode loads from the store what prefill has computed,
and the node cache, a service, may start again below them."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.models import make_model
from tests.examples.deploy.files import (
    COMPOSE,
    DEPLOY,
    SYSTEMD,
    Command,
    compose_commands,
    unit_command,
)
from tests.examples.deploy.local import NODE_CACHE, ROLES, Local, free_ports
from tests.faults.s3_server import S3Server
from tests.store.node.support import SOON_S, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

PROMPT_TOKENS = 700
# Of both systems; only compose has one as a health check.
STAT = ["ucm", "stat", "/etc/ucm/ucm.yaml", "--once", "--interval=0.1"]


def secrets_of_the_readme(folder: Path) -> Path:
    """Made as it says."""
    blocks = re.findall(r"```bash\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "secrets/s3_credentials" in block and "chmod" in block]
    subprocess.run(["bash", "-euc", block], cwd=folder, check=True, timeout=60)
    json.loads((folder / "secrets/s3_identities.json").read_text())
    return folder / "secrets"


@contextmanager
def compose(model: Path, folder: Path) -> Iterator[Local]:
    secrets = secrets_of_the_readme(folder)
    found = {each.where.removeprefix("compose "): each for each in compose_commands()}
    ports = free_ports()
    with S3Server() as s3:
        s3.ask("PUT", "../ucm-kv")
        places = {
            "/models/model": str(model),
            "/run/secrets": str(secrets),
            "0.0.0.0": "127.0.0.1",
            "seaweedfs:8333": f"127.0.0.1:{s3.port}",
            **{f"{role}:8000": f"127.0.0.1:{ports[role]}" for role in ROLES},
        }
        files = {"/etc/ucm/ucm.yaml": COMPOSE.parent / "ucm.yaml"}
        with Local(found, files, places, ports) as local:
            yield local


@contextmanager
def systemd(model: Path, folder: Path) -> Iterator[Local]:
    (folder / "kv").mkdir()
    (folder / "api-keys").write_text("a-key-of-this-test\n")
    found = {
        NODE_CACHE: unit_command(SYSTEMD / "ucm-node-cache.service"),
        "proxy": unit_command(SYSTEMD / "ucm-proxy.service"),
        **{role: unit_command(SYSTEMD / "ucm-vllm@.service", role) for role in ROLES},
    }
    ports = free_ports()
    places = {
        "/models/Qwen2.5-7B-Instruct": str(model),
        "/mnt/kv": str(folder / "kv"),
        "0.0.0.0": "127.0.0.1",
        **{
            f"{each.environment['HOST']}:{each.environment['PORT']}": f"127.0.0.1:{ports[role]}"
            for role, each in found.items()
            if role in ROLES
        },
    }
    names = {"ucm.yaml": SYSTEMD, "instances.yaml": SYSTEMD, "api-keys": folder}
    files = {f"/etc/ucm/{name}": place / name for name, place in names.items()}
    with Local(found, files, places, ports) as local:
        yield local


def ask(local: Local, prompt: list[int], key: str) -> tuple[int, str, dict[str, Any]]:
    """Status, the way that the proxy says it took, and the answer."""
    port = local.ports["proxy"]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    model = json.loads(local.server("decode").client.get("/v1/models")[1])["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    client.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = client.getresponse()
    found = json.loads(answer.read())
    client.close()
    return answer.status, answer.headers.get("x-ucm-pd-path", ""), found


@pytest.mark.parametrize("example", [compose, systemd])
def test_decode_loads_what_prefill_stored_also_behind_a_node_cache_that_starts_again(
    example, tmp_path: Path
):
    model = make_model(tmp_path / "models", "tiny")
    with example(model, tmp_path) as local:
        stat = Command("stat", STAT)
        local.start(NODE_CACHE)
        local.wait_well(NODE_CACHE, stat)
        for role in ROLES:
            local.start(role)
        for role in ROLES:
            local.server(role).wait_ready()
        local.start("proxy")
        local.server("proxy").wait_ready()
        check = {each.where: each for each in compose_commands()}["compose proxy, healthcheck"]
        local.wait_well("proxy", check)
        key = next(local.folder.parent.rglob("api-keys"), None) or tmp_path / "secrets/api_keys"
        right_key = key.read_text().strip()

        def check_loaded(prompt: list[int]) -> str:
            """By decode: prefill may compute what is cheaper to compute."""
            client = local.server("decode").client
            before = client.counters()
            status, path, answer = ask(local, prompt, right_key)
            assert (200, "pd") == (status, path), answer

            def has_loaded() -> bool:
                gained = client.counters() - before
                return bool(gained.external_hits >= len(prompt) // 128 * 128)

            wait_until(has_loaded, "decode has loaded the prompt", within_s=15)
            return str(answer["choices"][0]["text"])

        first = [3 + i % 250 for i in range(PROMPT_TOKENS)]
        second = [3 + i * 7 % 250 for i in range(PROMPT_TOKENS)]
        assert 401 == ask(local, first, "another-key")[0]
        said = check_loaded(first)

        service = local.processes[NODE_CACHE]
        service.send_signal(signal.SIGTERM)
        assert 0 == service.wait(30), service.log_tail()
        assert 200 == ask(local, second, right_key)[0]
        assert not local.is_well(NODE_CACHE, stat), "an engine has started one"

        local.start(NODE_CACHE)
        local.wait_well(NODE_CACHE, stat)
        wait_until(lambda: num_clients(local) >= 4, "both engines are connected", within_s=SOON_S)
        assert said == check_loaded(first), "pages outlive the node cache"
        check_loaded([3 + i * 11 % 250 for i in range(PROMPT_TOKENS)])


def num_clients(local: Local) -> int:
    command = Command("stat", [*STAT, "--json"])
    argv = local.argv(NODE_CACHE, command)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return int(json.loads(done.stdout)["num_clients"])
