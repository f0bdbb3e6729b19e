"""Every message of `ucm` that a person can meet, read from the source.

A message is what is logged at warning level and above, what an error that leaves this project is
raised with, and what the proxy answers by itself. Its words are the constant parts of the first
string of the call; what varies is `…`. Assertions and ProgrammingErrors (ValueError, RuntimeError)
are for developers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LOGGED = {"warning", "error", "exception", "critical"}
_ANSWERED = {"error_response", "error_body"}
# Of these the message is what they are called with, wherever that is.
_ERRORS = re.compile(
    r"^(ConfigError|UnsupportedEngine|ProtocolError|NodeUnavailable|TierError|TaskFailed|UcmError"
    r"|BackendAway|NotPlain"
    r"|EtcdError|EtcdRefused|SystemExit|Exit|QueueFull|NoInstance|tier_error|BadParameter)$"
)
_VARIES = "…"


def messages() -> dict[str, list[str]]:
    """Message -> places (file:line)."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "ucm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call):
                for text in _texts(node):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    found.setdefault(text, []).append(place)
    return found


def _texts(call: ast.Call) -> Iterator[str]:
    name = _name(call.func)
    is_logged = name in _LOGGED and "log" in ast.unparse(call.func).lower()
    is_noticed = name == "warn" and "notice" in ast.unparse(call.func).lower()
    if not (is_logged or is_noticed or name in _ANSWERED or _ERRORS.match(name)):
        return
    if is_noticed:
        kind, text = (_template(argument) or _VARIES for argument in call.args)
        yield re.sub(rf"{_VARIES}+", _VARIES, f"{kind.replace('_', ' ')}: {text}")
        return
    for argument in call.args:
        text = _template(argument)
        if text is not None and re.search(r"[a-z]{2}", text.replace(_VARIES, "")):
            yield text
            return


def _name(of: ast.expr) -> str:
    return of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")


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
