"""What the instances are asked, made from what the client has asked. Pure.

For prefill, everything that shapes the prompt's tokens or their keys stays, in its order: tools end
up in the prompt in the order of their keys. What shapes only the output is brought down to one
token, because it would cost the prefill instance time, or contradict an answer of one token.

Decode gets the client's own bytes, and behind the last field what it is told of the prefill.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ucm import handoff

KV_PARAMS = "kv_transfer_params"
GRAMMARS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
# Only about the output; with one token that is not streamed they are errors or useless work.
_DROPPED = (
    "stream_options",
    "min_tokens",
    "min_completion_tokens",
    "best_of",
    "use_beam_search",
    "logprobs",
    "top_logprobs",
    *GRAMMARS,
    # Whatever a client puts there is not for the engines: it is the proxy's.
    KV_PARAMS,
)
# Brought to 1 where the client has set them. `max_completion_tokens` wins over `max_tokens`.
_ONE_IF_GIVEN = ("max_completion_tokens", "max_output_tokens", "n")
# Answers about the prompt itself need its logits, which a hit skips.
_ABOUT_THE_PROMPT = ("prompt_logprobs", "echo")

# A guess at how many tokens an image becomes; only to compare instances.
_IMAGE_TOKENS = 1000
_BYTES_PER_TOKEN = 4
_MAX_MODEL_CHARS = 256


def parse_body(body: bytes) -> dict[str, Any] | None:
    """The fields of a request; None if it is no JSON object."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        try:
            fields = json.loads(body)  # takes what vLLM takes, such as NaN and lone surrogates
        except (ValueError, RecursionError):
            return None
    return fields if isinstance(fields, dict) else None


def kind_of(path: str, fields: Mapping[str, Any]) -> str:
    """The same for requests that need the same of an instance: its route, and its model."""
    return f"{path} {str(fields.get('model'))[:_MAX_MODEL_CHARS]}"


def prefill_body(fields: Mapping[str, Any], *, path: str) -> bytes:
    """The request that computes the same prompt and as little else as there can be: one token."""
    first = {name: value for name, value in fields.items() if name not in _DROPPED}
    for name in _ONE_IF_GIVEN:
        if name in first:
            first[name] = 1
    if path.endswith("/responses"):
        first["max_output_tokens"] = 1
        # A prefill is nobody's conversation.
        first["store"] = False
    else:
        first["max_tokens"] = 1
    first["stream"] = False
    first[KV_PARAMS] = handoff.params(handoff.Wanted())
    return json.dumps(first, separators=(",", ":")).encode()


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


_answers = msgspec.json.Decoder(_Answer)


def params_of(answer: bytes) -> bytes | None:
    """The `kv_transfer_params` object of a prefill's answer as they stand there, whosever they are;
    None if there is none."""
    try:
        params = bytes(_answers.decode(answer).kv_transfer_params)
        # Nothing has looked into them yet, and what is broken would break the client's request.
        return params if isinstance(msgspec.json.decode(params), dict) else None
    except (ValueError, RecursionError):
        return None


def with_params(body: bytes, params: bytes) -> bytes:
    """The client's request with these `kv_transfer_params`; every other byte is the client's. Of
    two fields of one name the last one counts. `body` is a JSON object."""
    if not json.detect_encoding(body).startswith("utf-8"):
        return body  # vLLM reads UTF-16 as well; a hint is not worth the work
    end = body.rindex(b"}")
    before = body[:end]
    comma = b"" if before.rstrip().endswith(b"{") else b","
    return b"".join((before, comma, b'"', KV_PARAMS.encode(), b'":', params, body[end:]))


def why_not_prefill(fields: Mapping[str, Any], *, min_tokens: int) -> str | None:
    """A reason to send the request to decode alone, if there is one."""
    if asks_for_any(fields, _ABOUT_THE_PROMPT):
        return "about_prompt"
    if fields.get("truncate_prompt_tokens") == -1:
        # To what is left beside max_tokens: the legs would keep different ends of the prompt.
        return "truncated"
    most = most_tokens(fields)
    return "short" if most is not None and most < min_tokens else None


def asks_for_any(fields: Mapping[str, Any], names: Iterable[str]) -> bool:
    """`prompt_logprobs: 0` asks for something, `echo: false` doesn't."""
    values = (fields.get(name) for name in names)
    return any(value is not None and value is not False for value in values)


def most_tokens(fields: Mapping[str, Any]) -> int | None:
    """A bound of the prompt's length in tokens: a token of text is at least a byte. None where
    nothing bounds it: a chat template and images add tokens of their own."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        # One for a token that the tokenizer may put in front.
        return len(prompt.encode(errors="replace")) + 1
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return len(prompt)
    return None


def guess_tokens(fields: Mapping[str, Any]) -> int:
    """About how many tokens the prompt has, to compare what instances have to do."""
    prompt = fields.get("prompt", fields.get("messages", fields.get("input")))
    return max(1, _guess(prompt))


def _guess(value: object) -> int:
    if isinstance(value, str):
        return len(value) // _BYTES_PER_TOKEN
    if isinstance(value, int):
        return 1
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value)
        return sum(map(_guess, value))
    if isinstance(value, dict):
        if "image" in str(value.get("type")):
            return _IMAGE_TOKENS
        return sum(_guess(each) for name, each in value.items() if name not in ("type", "role"))
    return 0
