"""Prompts that a tool is given: in a file, or one per line.

    prompts.txt    one prompt, all of the file's text
    prompt.json    one prompt, as JSON
    prompts.jsonl  a prompt per line, each as JSON
    -              the same from standard input

A prompt as JSON is a text, a list of token ids, the messages of a chat, or a request that has one
of these in `prompt` or `messages`, as clients send it: all that it has may be told by its tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import msgspec

from ucm.errors import UcmError

STDIN: Final = "-"

# Token ids, or the body of a request for `/v1/completions` or `/v1/chat/completions`.
PromptValue = list[int] | dict[str, Any]


@dataclass(frozen=True)
class GivenPrompt:
    """`where` it was given, for people."""

    value: PromptValue
    salt: str | None = None
    where: str = field(default="", compare=False)


def read_prompts(source: str) -> list[GivenPrompt]:
    """All of them, at least one. Raises UcmError, which says what line of what is wrong."""
    text = _text(source)
    if not text.strip():
        raise UcmError(f"{source}: has no prompts: it is empty")
    if source != STDIN and not source.endswith(".jsonl"):
        given = _from_json(text, source) if source.endswith(".json") else text
        return [_prompt(given, source)]
    # Not what else ends a line for `splitlines`: JSON may have it inside a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    places = [(f"{source}: line {number}", line) for number, line in lines]
    return [_prompt(_from_json(line, where), where) for where, line in places]


def _text(source: str) -> str:
    try:
        if source == STDIN:
            return _standard_input()
        with open(source, "rb") as file:
            return file.read().decode()
    except OSError as error:
        raise UcmError(f"{source}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UcmError(f"{source}: is not UTF-8: {error}") from error


def _standard_input() -> str:
    stream = sys.stdin
    if stream is None:  # as Python has it where it is closed
        raise UcmError(f"{STDIN}: can't be read: standard input is closed")
    return stream.buffer.read().decode()


def _from_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UcmError(f"{where}: no prompt can be read from it: {error}") from error


def _prompt(given: object, where: str) -> GivenPrompt:
    request = _as_request(given)
    value, salt = _value(request), request.get("cache_salt")
    if value is None or not (salt is None or isinstance(salt, str)):
        raise UcmError(
            f"{where}: expected a text, a list of tokens, the messages of a chat, or a request "
            f"with `prompt` or `messages`"
        )
    try:
        msgspec.json.encode(request)
    except (UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise UcmError(f"{where}: has what no request can have: {error}") from error
    return GivenPrompt(value, salt, where)


def _as_request(given: object) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    is_chat = isinstance(given, list) and given and isinstance(given[0], dict)
    return {"messages" if is_chat else "prompt": given}


def _value(request: dict[str, Any]) -> PromptValue | None:
    """None for what is no prompt."""
    messages, prompt = request.get("messages"), request.get("prompt")
    if messages is not None:
        is_chat = isinstance(messages, list) and all(isinstance(each, dict) for each in messages)
        return request if is_chat and messages else None
    if _are_tokens(prompt):
        return request if request.get("truncate_prompt_tokens") is not None else prompt
    return request if isinstance(prompt, str) and prompt else None


def _are_tokens(prompt: object) -> TypeGuard[list[int]]:
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(type(each) is int and 0 <= each < 1 << 32 for each in prompt)
