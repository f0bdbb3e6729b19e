"""What the instances are asked, made from what the client has asked. Pure.

For prefill, everything that shapes the prompt's tokens or their keys stays, in its order: tools end
up in the prompt in the order of their keys. What shapes only the output is brought down to one
token, because it would cost the prefill instance time, or contradict an answer of one token.

Decode gets the client's own bytes, and behind the last field what it is told of the prefill. Words
of a hand-off are the proxy's alone: a client's are taken out, or anybody could make an engine wait
for what nobody computes.

A hand-off is about one prompt. A request that has several of which some are too short for one has
the others prefilled, and decode is told of none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeGuard

import msgspec

from ucm import handoff
from ucm.pd.legs import bodies
from ucm.pd.protocol import CHAT_BATCH, GENERATE, MESSAGES, RESPONSES

KV_PARAMS = "kv_transfer_params"
# For decode where there is nothing else to say to it.
ANSWER_WANTED: Final = msgspec.json.encode(handoff.params(handoff.Wanted(with_answer=True)))
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

# Guesses at how many tokens media become, whatever bytes they have; only to compare instances.
_MEDIA_TOKENS = {"image": 1000, "video": 8000, "audio": 750, "file": 4000, "document": 4000}
_MEDIA_URL = re.compile(r"data:(image|video|audio)/")
# Where a request has what ends up in its prompt.
_PROMPTS = ("prompt", "messages", "input", "token_ids", "system", "instructions", "tools")
BYTES_PER_TOKEN: Final = 4
# What they are, not what they say.
NO_TEXT: Final = ("type", "role")
_MAX_MODEL_CHARS = 256


def parse_body(body: bytes) -> dict[str, Any] | None:
    """The fields of a request; None if it is no JSON object."""
    try:
        fields = bodies.decode(body)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def kind_of(path: str, fields: Mapping[str, Any]) -> str:
    """The same for requests that need the same of an instance: its route, and its model."""
    return f"{path} {str(fields.get('model'))[:_MAX_MODEL_CHARS]}"


def prefill_fields(fields: Mapping[str, Any], *, path: str) -> dict[str, Any]:
    """The request that computes the same prompt and as little else as there can be: one token."""
    first = {name: value for name, value in fields.items() if name not in _DROPPED}
    for name in _ONE_IF_GIVEN:
        if name in first:
            first[name] = 1
    if path == RESPONSES:
        first["max_output_tokens"] = 1
        # A prefill is nobody's conversation, and what is not kept can't be made in the background.
        first["store"] = False
        first.pop("background", None)
    elif path == GENERATE:
        first["sampling_params"] = _one_token(first.get("sampling_params"))
    else:
        first["max_tokens"] = 1
    first["stream"] = False
    if path == CHAT_BATCH:
        # Each of its prompts would be told, and the answer has no receipt for any.
        return first
    first[KV_PARAMS] = handoff.params(handoff.Wanted())
    if path == MESSAGES:
        # vLLM refuses to think for more tokens than it may make, but in a prefill that says so.
        first[KV_PARAMS]["do_remote_decode"] = True
    return first


def prefill_body(fields: Mapping[str, Any], *, path: str) -> bytes:
    """`prefill_fields` as they are sent."""
    return bodies.encode(prefill_fields(fields, path=path))


def _one_token(sampling: object) -> object:
    """`/inference/v1/generate` has its sampling in an object of its own."""
    if not isinstance(sampling, dict):
        return {"max_tokens": 1} if sampling is None else sampling
    first = {name: value for name, value in sampling.items() if name not in _DROPPED}
    if "n" in first:
        first["n"] = 1
    return first | {"max_tokens": 1}


class _AnswerParams(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


_answers = msgspec.json.Decoder(_AnswerParams)


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
    if not _is_utf8(body):
        return body  # vLLM reads UTF-16 as well; a hint is not worth the work
    end = body.rindex(b"}")
    before = body[:end]
    comma = b"" if before.rstrip().endswith(b"{") else b","
    return b"".join((before, comma, b'"', KV_PARAMS.encode(), b'":', params, body[end:]))


def may_be_told(fields: Mapping[str, Any]) -> bool:
    """Whether words that are not needed may stand in the request: a client may have some for
    another connector in their place."""
    sampling = fields.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    return fields.get(KV_PARAMS) is None and not (isinstance(extra, dict) and extra.get(KV_PARAMS))


def may_have_words(body: bytes) -> bool:
    """Cheap. In UTF-8 the name stands there as it is, or with escaped characters."""
    return KV_PARAMS.encode() in body or rb"\u00" in body or not _is_utf8(body)


def without_words(body: bytes, fields: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The client's request without words of a hand-off; as it is if it has none."""
    params = fields.get(KV_PARAMS)
    changed = {KV_PARAMS: wordless(params)} if _has_words(params) else {}
    # /inference/v1/generate lets clients write there what goes to the engine under that name.
    sampling = fields.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    if isinstance(extra, dict) and _has_words(extra.get(KV_PARAMS)):
        extra = {**extra, KV_PARAMS: wordless(extra[KV_PARAMS])}
        changed["sampling_params"] = {**fields["sampling_params"], "extra_args": extra}
    if not changed:
        return body, fields
    fields = {**fields, **changed}
    return bodies.encode(fields), fields


def _has_words(params: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(params, dict) and handoff.NAME in params


def wordless(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Without words of a hand-off; None if that is all."""
    return {name: value for name, value in params.items() if name != handoff.NAME} or None


def _is_utf8(body: bytes) -> bool:
    return json.detect_encoding(body).startswith("utf-8")


def why_not_prefill(fields: Mapping[str, Any], *, min_tokens: int) -> str | None:
    """A reason to send the request to decode alone, if there is one."""
    if asks_for_any(fields, _ABOUT_THE_PROMPT):
        return "about_prompt"
    sampling = fields.get("sampling_params")
    if isinstance(sampling, dict) and asks_for_any(sampling, _ABOUT_THE_PROMPT):
        return "about_prompt"
    if fields.get("previous_response_id") is not None:
        # What the prompt begins with is where that response was made.
        return "continued"
    if fields.get("truncate_prompt_tokens") == -1 or fields.get("truncation") == "auto":
        # To what is left beside max_tokens: the legs would keep different ends of the prompt.
        return "truncated"
    most = most_tokens(fields)
    return "short" if most is not None and most < min_tokens else None


def asks_for_any(fields: Mapping[str, Any], names: Iterable[str]) -> bool:
    """`prompt_logprobs: 0` asks for something, `echo: false` doesn't."""
    values = (fields.get(name) for name in names)
    return any(value is not None and value is not False for value in values)


def most_tokens(fields: Mapping[str, Any]) -> int | None:
    """A bound of the length in tokens of the longest prompt: a token of text is at least a byte.
    None where nothing bounds it: a chat template and images add tokens of their own."""
    ids = fields.get("token_ids")  # of /inference/v1/generate
    prompts = _prompts(fields.get("prompt") if ids is None else ids)
    bounds = [_bound(prompt) for prompt in prompts]
    known = [bound for bound in bounds if bound is not None]
    return max(known, default=0) if len(known) == len(bounds) else None


def long_prompts(fields: dict[str, Any], *, min_tokens: int) -> tuple[dict[str, Any], bool]:
    """The request with only those of its prompts that may be long enough, and whether that is all
    of them."""
    prompts = _prompts(fields.get("prompt"))
    long = [each for each in prompts if (bound := _bound(each)) is None or bound >= min_tokens]
    if len(long) == len(prompts):
        return fields, True
    return {**fields, "prompt": long}, False


def _prompts(prompt: object) -> list[object]:
    """vLLM makes a request of its own of each."""
    is_several = isinstance(prompt, list) and any(not isinstance(each, int) for each in prompt)
    return prompt if is_several and isinstance(prompt, list) else [prompt]


def _bound(prompt: object) -> int | None:
    if isinstance(prompt, str):
        # One for a token that the tokenizer may put in front.
        return len(prompt.encode(errors="replace")) + 1
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return len(prompt)
    return None


def guess_tokens(fields: Mapping[str, Any]) -> int:
    """About how many tokens the prompt has, to compare what instances have to do."""
    return max(1, sum(guess(fields.get(name)) for name in _PROMPTS))


def guess(value: object) -> int:
    """About how many tokens a part of a prompt has."""
    if isinstance(value, str):
        # Media also come as text, where their kind is not said.
        kind = _MEDIA_URL.match(value)
        return _MEDIA_TOKENS[kind[1]] if kind else len(value) // BYTES_PER_TOKEN
    if isinstance(value, int):
        return 1
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value)
        return sum(map(guess, value))
    if isinstance(value, dict):
        kind_of_part = str(value.get("type"))
        for media, tokens in _MEDIA_TOKENS.items():
            if media in kind_of_part:
                return tokens
        return sum(guess(each) for name, each in value.items() if name not in NO_TEXT)
    return 0
