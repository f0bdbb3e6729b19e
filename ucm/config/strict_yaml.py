"""Reads one YAML file, strictly: whatever is wrong with it is one line that names file and line.

What it holds is a tree, of a size that its file could have without aliases: whoever walks it ends.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import yaml

from ucm.errors import ConfigError

# A file of settings has a few KiB, and one of a thousand instances less than 100.
_MAX_CHARS: Final = 1 << 20
# Keys and values with all that their aliases stand for.
_MAX_NODES: Final = 100_000
# Of any number that a setting may have, and of any that can be shown.
_MAX_INT_BITS: Final = 256
_SHOWN_CHARS: Final = 200


def read_yaml(path: str) -> object:
    """The file's single document. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_CHARS + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason}") from error
    if len(text) > _MAX_CHARS:
        raise ConfigError(f"{path}: has more than {_MAX_CHARS} characters, is it the right file?")
    if not text.strip():
        raise ConfigError(f"{path}: is empty")
    try:
        # Our loader is yaml's safe one with one more check.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(error.problem or error.context or error).split())
        raise ConfigError(f"{path}: {line}bad YAML: {_short(problem)}") from error
    except _BAD_YAML as error:
        raise ConfigError(f"{path}: bad YAML: {_short(' '.join(str(error).split()))}") from error


# "2024-13-45" looks like a date to YAML and isn't one (ValueError). And its constructors take for
# granted that what has a tag is of its kind: "!!bool maybe" is a KeyError, "!!int" an IndexError.
_BAD_YAML: Final = (
    *(yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError),
    RecursionError,
)


def _short(problem: str) -> str:
    return problem if len(problem) <= _SHOWN_CHARS else problem[:_SHOWN_CHARS] + "..."


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, where YAML silently takes the last; and
    aliases that make much of little: nine of nine of nine..., or a list that is in itself."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _num_nodes(node, {})
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > _MAX_INT_BITS:
            raise yaml.constructor.ConstructorError(
                problem="a number with too many digits", problem_mark=node.start_mark
            )
        return value

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


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _num_nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """With what aliases stand for, each time. Raises MarkedYAMLError beyond the bound."""
    if node in known:
        return known[node]
    # While its own parts are counted: who meets it then is in itself, and has no end.
    known[node] = _MAX_NODES
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        parts = [each for pair in node.value for each in pair]
    count = 1 + sum(_num_nodes(each, known) for each in parts)
    if count > _MAX_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"aliases that stand for more than {_MAX_NODES} values, or for themselves",
            problem_mark=node.start_mark,
        )
    known[node] = count
    return count
