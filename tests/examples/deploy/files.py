"""What stands in examples/deploy/: its files as their readers see them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[3] / "examples" / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes"
SYSTEMD = DEPLOY / "systemd"
SETTINGS = sorted(DEPLOY.rglob("ucm.yaml"))
UNITS = sorted(SYSTEMD.glob("*.service"))
# The only variable of compose.yaml without a default.
COMPOSE_ENVIRONMENT = {"MODEL_DIR": "/srv/models/some"}

_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::(?P<how>[-?])(?P<rest>[^}]*))?\}")


@dataclass(frozen=True)
class Command:
    """Something that an example starts. `where`: for people."""

    where: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> tuple[str, ...]:
        """With its subcommand, where it has some."""
        name = Path(self.argv[0]).name
        return (name, self.argv[1]) if name in ("ucm", "vllm") else (name,)

    @property
    def flags(self) -> list[str]:
        return self.argv[len(self.program) :]


def read_compose(environment: Mapping[str, str] = COMPOSE_ENVIRONMENT) -> dict[str, Any]:
    """With variables filled in and what is merged in its place."""
    return dict(_filled_in(yaml.safe_load(COMPOSE.read_text()), environment))


def _filled_in(tree: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(tree, dict):
        return {key: _filled_in(value, environment) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled_in(value, environment) for value in tree]
    if not isinstance(tree, str):
        return tree

    def value_of(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        if environment.get(found["name"]):
            return environment[found["name"]]
        assert found["how"] == "-", f"{found[0]}: {found['name']} is not set"
        return found["rest"]

    return _VARIABLE.sub(value_of, tree)


def read_manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every object of a kustomization's own resources, and the file in which it stands."""
    tree = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = [folder / name for name in tree["resources"] if name.endswith(".yaml")]
    return [(file, each) for file in files for each in yaml.safe_load_all(file.read_text())]


def pods_of(manifests: list[tuple[Path, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The pods of what has some, by its name."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for _, each in manifests
        if "template" in each.get("spec", {})
    }


def read_unit(unit: Path) -> dict[str, list[str]]:
    """Each setting's values, whatever its section. A line may go on behind a backslash."""
    values: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", " ", unit.read_text()).splitlines():
        if line and line[0] not in "#;[":
            name, _, value = line.partition("=")
            values.setdefault(name, []).append(value)
    return values


def unit_command(unit: Path, instance: str = "") -> Command:
    """Its ExecStart, with the variables of its environment's files, from here."""
    values = read_unit(unit)
    environment: dict[str, str] = {}
    for name in values.get("EnvironmentFile", []):
        file = SYSTEMD / Path(name.replace("%i", instance)).name
        lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
        environment |= dict(line.split("=", 1) for line in lines)
    (line,) = values["ExecStart"]
    # As systemd does: split first, and quotes keep no variable from being filled in.
    argv = [_filled_in(word, environment) for word in shlex.split(line)]
    return Command(f"{unit.name} {instance}".strip(), argv, environment)


def compose_commands() -> Iterator[Command]:
    for name, service in read_compose()["services"].items():
        where = f"compose {name}"
        yield Command(where, [*_words(service, "entrypoint"), *_words(service, "command")])
        if "healthcheck" in service:
            kind, *argv = service["healthcheck"]["test"]
            assert kind == "CMD"
            yield Command(f"{where}, healthcheck", argv)


def _words(service: dict[str, Any], name: str) -> list[str]:
    words = service.get(name, [])
    assert isinstance(words, list), f"{name}: write a list, which no shell has to take apart"
    return words


def kubernetes_commands() -> Iterator[Command]:
    for name, pod in pods_of(read_manifests(KUBERNETES / "base")).items():
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            where = f"kubernetes {name}, {container['name']}"
            yield Command(where, container["command"])
            for argv in _executed(container):
                yield Command(f"{where}, probe", argv)


def _executed(tree: Any) -> Iterator[list[str]]:
    """Commands of probes and hooks."""
    if isinstance(tree, dict):
        if "exec" in tree:
            yield tree["exec"]["command"]
        for value in tree.values():
            yield from _executed(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _executed(value)


def unit_commands() -> Iterator[Command]:
    for unit in UNITS:
        for instance in ("prefill", "decode") if "@" in unit.name else ("",):
            yield unit_command(unit, instance)


def all_commands() -> list[Command]:
    return [*compose_commands(), *kubernetes_commands(), *unit_commands()]
