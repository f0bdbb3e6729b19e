"""Every message of `ucm` that a person can meet, read from the source.

A message is what is logged at warning level and above, what an error that leaves this project is
raised with, and what the proxy answers by itself. Its words are the constant parts of the first
string of the call; what varies is `…`. Assertions and ProgrammingErrors (ValueError, RuntimeError)
are for developers.

What is put together first is found by these rules, and nothing else is:
* a local name stands for the texts that it is bound to in its function;
* where such a name is only a part of a message, its text is one by itself;
* so is what a function returns or appends whose docstring says that it is for people;
* and `error=` of any call, what is bound to `waits_for`, and what is appended to `warnings`.
Of the last three, what has hardly any words explains itself.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LOGGED = {"log", "warning", "error", "exception", "critical"}
_ANSWERED = {"error_response", "error_body"}
# Of these the message is what they are called with, wherever that is.
_ERRORS = re.compile(
    r"^(ConfigError|UnsupportedEngine|ProtocolError|NodeUnavailable|TierError|TaskFailed|UcmError"
    r"|BackendAway|NotPlain"
    r"|EtcdError|EtcdRefused|SystemExit|Exit|QueueFull|NoInstance|tier_error|translated|BadParameter)$"
)
_VARIES = "…"
_FOR_PEOPLE = re.compile(r"(?i)\bfor people\b|\ba person\b")
_KEYWORDS = {"error"}
_BOUND = {"waits_for"}
_APPENDED = {"warnings"}
_FEW_WORDS = 3


@dataclass
class _Scope:
    """A function's: what its local names are bound to, and whether it returns texts for people."""

    is_for_people: bool = False
    bound: dict[str, list[ast.expr]] = field(default_factory=dict)


@cache
def messages() -> dict[str, list[str]]:
    """Message -> places (file:line)."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "ucm").rglob("*.py")):
        for text, line in _of_file(ast.parse(path.read_bytes())):
            found.setdefault(text, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


def _of_file(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node, scope in _walk(tree, _Scope()):
        for text in _texts(node, scope):
            yield text, getattr(node, "lineno", 0)


def _walk(node: ast.AST, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = _scope(child)
        yield child, inner
        yield from _walk(child, inner)


def _scope(function: ast.FunctionDef | ast.AsyncFunctionDef) -> _Scope:
    said = " ".join((ast.get_docstring(function) or "").split())
    scope = _Scope(bool(_FOR_PEOPLE.search(said)))
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            scope.bound.setdefault(node.targets[0].id, []).append(node.value)
    return scope


def _texts(node: ast.AST, scope: _Scope) -> Iterator[str]:
    if isinstance(node, ast.Call):
        yield from _called(node, scope)
    for value in _put_together(node, scope):
        yield from filter(_has_words, _templates(value, scope))
        yield from _parts(value, scope)


def _put_together(node: ast.AST, scope: _Scope) -> Iterator[ast.expr]:
    """What becomes a message later on."""
    if isinstance(node, ast.Call):
        yield from (each.value for each in node.keywords if each.arg in _KEYWORDS)
        to = node.func
        if isinstance(to, ast.Attribute) and to.attr == "append" and _gathers(to.value, scope):
            yield from node.args
        return
    is_bound = isinstance(node, ast.Assign) and _name(node.targets[0]) in _BOUND
    if is_bound or (isinstance(node, ast.Return) and scope.is_for_people):
        assert isinstance(node, (ast.Assign, ast.Return)) and node.value is not None
        yield node.value


def _gathers(texts: ast.expr, scope: _Scope) -> bool:
    return scope.is_for_people or _name(texts) in _APPENDED


def _called(call: ast.Call, scope: _Scope) -> Iterator[str]:
    name, about = _name(call.func), ast.unparse(call.func).lower()
    if name == "warn" and "notice" in about:
        kinds, texts = ([*_templates(each, scope)] or [_VARIES] for each in call.args)
        for kind, text in itertools.product(kinds, texts):
            yield re.sub(rf"{_VARIES}+", _VARIES, f"{kind.replace('_', ' ')}: {text}")
    elif (name in _LOGGED and "log" in about) or name in _ANSWERED or _ERRORS.match(name):
        for argument in call.args:
            found = [text for text in _templates(argument, scope) if _says_something(text)]
            if found:
                yield from found
                break
    else:
        return
    for argument in call.args:
        yield from _parts(argument, scope)


def _says_something(text: str) -> bool:
    return bool(re.search(r"[a-z]{2}", text.replace(_VARIES, "")))


def _has_words(text: str) -> bool:
    return len(re.findall(r"[a-z']+", text)) > _FEW_WORDS


def _parts(value: ast.expr, scope: _Scope) -> Iterator[str]:
    """What stands in a message by a name."""
    if isinstance(value, ast.JoinedStr):
        for part in value.values:
            if isinstance(part, ast.FormattedValue):
                yield from filter(_has_words, _templates(part.value, scope))


def _name(of: ast.expr) -> str:
    return of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")


def _templates(node: ast.expr, scope: _Scope) -> Iterator[str]:
    """All that an expression may say, as far as it says it in words."""
    if isinstance(node, ast.Name):
        for value in scope.bound.get(node.id, ()):
            if not isinstance(value, ast.Name):
                yield from _templates(value, scope)
    elif isinstance(node, ast.IfExp):
        yield from _templates(node.body, scope)
        yield from _templates(node.orelse, scope)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _templates(value, scope)
    elif (text := _template(node)) is not None:
        yield text


def _template(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[-\d.]*[sdrxfg]", _VARIES, node.value)
    elif isinstance(node, ast.JoinedStr):
        parts = (
            _template(part) if isinstance(part, ast.Constant) else _VARIES for part in node.values
        )
        text = "".join(part or "" for part in parts)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = f"{_template(node.left) or _VARIES}{_template(node.right) or _VARIES}"
    else:
        return None
    return re.sub(rf"{_VARIES}+", _VARIES, text)


if __name__ == "__main__":
    for text, places in messages().items():
        print(f"{text!r}  {places}")
