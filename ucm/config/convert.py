"""Turns a checked tree into a frozen struct, and what doesn't fit into one readable line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ucm.config.vocabulary import did_you_mean
from ucm.errors import ConfigError

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

_SHOWN_CHARS: Final = 60
# msgspec's message: "Expected `int` >= 1 - at `$.store.posix_read_threads`".
_MESSAGE: Final = re.compile(
    r"^(?P<problem>.*?)(, got .*?)?( - at `\$\.?(?P<path>.*)`)?$", re.DOTALL
)
_WORDS: Final = {
    "`int`": "a whole number",
    "`float`": "a number",
    "`bool`": "true or false",
    "`str`": "text",
    "`str | null`": "text",
}


def convert_tree(
    tree: Mapping[str, object], struct: type[_Struct], *, source: str, names: Mapping[str, str]
) -> _Struct:
    """`tree` as a `struct`. Raises ConfigError with the path of the key; `names` says what a field
    of the struct is called in the file."""
    try:
        return msgspec.convert(tree, struct)
    except msgspec.ValidationError as error:
        match = _MESSAGE.match(str(error))
        assert match is not None
        path = match["path"] or ""
        value = _at(tree, path)
        problem = match["problem"]
        if problem.startswith("Invalid enum value"):
            problem = _expected_choice(struct, path, value)
        else:
            problem = problem[:1].lower() + problem[1:] + f", got {show(value)}"
            for word, plain in _WORDS.items():
                problem = problem.replace(word, plain)
        first, dot, rest = path.partition(".")
        shown_path = names.get(first, first) + dot + rest
        raise ConfigError(f"{source}: {shown_path}: {problem}") from error


def check_unicode(tree: object, *, source: str) -> None:
    """Raises ConfigError for a text, or a key, with a lone surrogate: JSON and YAML can spell one,
    and it is in no path, no group's name and nothing else that is written down."""
    todo: list[tuple[str, object]] = [("", tree)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, str) and not is_unicode(value):
            raise ConfigError(f"{source}: {path}: {show(value)} is not Unicode text: write it anew")
        if isinstance(value, Mapping):
            todo += [(path or "top level", key) for key in value]
            todo += [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(f"{path}[{i}]", each) for i, each in enumerate(value)]


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def show(value: object) -> str:
    """A value as YAML would spell it, in one short line."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _at(tree: object, path: str) -> object:
    value: Any = tree
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        value = value[int(index)] if not key else value[key]
    return value


def _expected_choice(struct: type[msgspec.Struct], path: str, value: object) -> str:
    """All choices of the field, and the nearest one."""
    hint: Any = get_type_hints(struct).get(path)
    choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
    return (
        f"expected one of {', '.join(choices)}, got {show(value)}"
        f"{did_you_mean(str(value), choices)}"
    )
