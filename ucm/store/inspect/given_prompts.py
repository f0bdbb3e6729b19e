"""Prompts that a tool is given: in a file, or one per line.

    prompts.txt    one prompt, all of the file's text
    prompt.json    one prompt, as JSON
    prompts.jsonl  a prompt per line, each as JSON
    -              the same from standard input

A prompt as JSON is a text, a list of token ids, the messages of a chat, or a request that has one
of these in `prompt` or `messages`, and perhaps a `cache_salt`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Final, TypeGuard

from ucm.errors import UcmError

STDIN: Final = "-"

# A text, token ids, or messages.
PromptValue = str | list[int] | list[dict[str, object]]


@dataclass(frozen=True)
class GivenPrompt:
    value: PromptValue
    salt: str | None = None


def read_prompts(source: str) -> list[GivenPrompt]:
    """All of them, at least one. Raises UcmError, which says what line of what is wrong."""
    text = _text(source)
    if source != STDIN and not source.endswith(".jsonl"):
        given = _from_json(text, source) if source.endswith(".json") else text
        return [_prompt(given, source)]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UcmError(f"{source}: has no prompts: one is expected on each line, as JSON")
    places = [(f"{source}: line {number}", line) for number, line in lines]
    return [_prompt(_from_json(line, where), where) for where, line in places]


def _text(source: str) -> str:
    try:
        if source == STDIN:
            return sys.stdin.buffer.read().decode()
        with open(source, "rb") as file:
            return file.read().decode()
    except OSError as error:
        raise UcmError(f"{source}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UcmError(f"{source}: is not UTF-8: {error}") from error


def _from_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UcmError(f"{where}: no prompt can be read from it: {error}") from error


def _prompt(given: object, where: str) -> GivenPrompt:
    value, salt = given, None
    if isinstance(given, dict):
        value = given.get("prompt") if given.get("messages") is None else given["messages"]
        salt = given.get("cache_salt")
    if not _is_prompt(value) or not (salt is None or isinstance(salt, str)):
        raise UcmError(
            f"{where}: expected a text, a list of tokens, the messages of a chat, or a request "
            f"with `prompt` or `messages`"
        )
    return GivenPrompt(value, salt)


def _is_prompt(value: object) -> TypeGuard[PromptValue]:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    are_tokens = all(type(each) is int and 0 <= each < 1 << 32 for each in value)
    return are_tokens or all(isinstance(each, dict) for each in value)
