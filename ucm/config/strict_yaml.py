"""Reads one YAML file, strictly: whatever is wrong with it is one line that names file and line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ucm.errors import ConfigError


def read_yaml(path: str) -> object:
    """The file's single document. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason}") from error
    if not text.strip():
        raise ConfigError(f"{path}: is empty")
    try:
        # Our loader is yaml's safe one with one more check.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(error.problem or error.context or error).split())
        raise ConfigError(f"{path}: {line}bad YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: "2024-13-45" looks like a date to YAML and isn't one.
        raise ConfigError(f"{path}: bad YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first_lines and key != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} is given twice, first on line {first_lines[key]}",
                    problem_mark=key_node.start_mark,
                )
            first_lines[key] = line
        return super().construct_mapping(node, deep)
