"""Going on with a stream on another instance: what the client has, and what to ask for the rest.

The prompt's KV is in the store, so the other instance has only the generated part to compute. It is
asked for prompt plus what was generated; its events go on under the id of the first, and what they
count or say once adds up with it. The seam shows only where text is tokenized otherwise than it was
generated, or where a stop string lies across it.

Nothing is resumed whose state can't be told from the stream: several sequences, tool calls,
reasoning, grammars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ucm.pd.legs import bodies
from ucm.pd.legs.rewrite import GRAMMARS, asks_for_any

_DONE = b"[DONE]"
_DATA = b"data:"
# An event that is longer than this is passed on as it comes; the stream can't be resumed then.
MAX_EVENT_BYTES = 4 << 20
# The state of a grammar, and of whatever else is not in the text, would start anew.
_STATEFUL = (
    *GRAMMARS,
    "use_beam_search",
    "echo",
    "suffix",
    "prompt_logprobs",
)
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")


class Events:
    """Cuts a stream at the ends of its events. What was fed comes out again, byte by byte."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """All that is complete by now."""
        data = self._rest + piece
        end = max(_end_of(data, b"\n\n"), _end_of(data, b"\r\n\r\n"))
        if len(data) - end > MAX_EVENT_BYTES:
            end = len(data)
        self._rest = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """An event that has no end yet."""
        rest, self._rest = self._rest, b""
        return rest


def _end_of(data: bytes, mark: bytes) -> int:
    position = data.rfind(mark)
    return 0 if position < 0 else position + len(mark)


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None

    @property
    def has_more_than_text(self) -> bool:
        return any((self.tool_calls, self.function_call, self.reasoning, self.reasoning_content))


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _StreamEvent(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    choices: list[_Choice] = []
    error: Any = None


_decoder = msgspec.json.Decoder(_StreamEvent)


class Tracker:
    """What one stream has brought so far. `fields` are the client's."""

    def __init__(self, fields: Mapping[str, Any], *, is_chat: bool) -> None:
        self.is_done = False
        self._fields = fields
        self._is_chat = is_chat
        self._id: str | None = None
        self._created: int | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._num_tokens = 0
        self._has_finished = False
        self._resumable = _can_be_resumed(fields, is_chat=is_chat)
        # What the stream that is going on now was given of the answer, as if it were prompt.
        self._given_tokens = 0
        self._given_chars = 0
        # Said once in an answer, at its beginning.
        self._has_role = False
        # The same when the stream that is going on now began.
        self._had_begun = self._had_role = False

    @property
    def can_resume(self) -> bool:
        return self._resumable and not self._has_finished and not self.is_done

    @property
    def lacks_only_the_end(self) -> bool:
        """Nothing that the client has asked for is missing but [DONE]."""
        options = self._fields.get("stream_options")
        wants_usage = isinstance(options, dict) and options.get("include_usage")
        return self._resumable and self._has_finished and not self.is_done and not wants_usage

    def add(self, events: bytes) -> None:
        """Notes whole events of the stream."""
        for line in events.splitlines():
            if line.startswith(_DATA):
                self._note(line[len(_DATA) :].strip())

    def _note(self, data: bytes) -> None:
        if data == _DONE:
            self.is_done = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError:
            self._resumable = False
            return
        self._id, self._created = self._id or event.id, self._created or event.created
        self._resumable = self._resumable and event.error is None
        for choice in event.choices:
            delta = choice.delta
            if choice.index or (delta is not None and delta.has_more_than_text):
                self._resumable = False
            self._has_role = self._has_role or bool(delta is not None and delta.role)
            text = choice.text or (delta.content if delta is not None else None) or ""
            token_ids = choice.token_ids or []
            self._text.append(text)
            self._token_ids += token_ids
            # vLLM sends an event for each token, unless it is told to send ids as well.
            self._num_tokens += len(token_ids) or bool(text)
            self._has_finished = self._has_finished or choice.finish_reason is not None

    def body(self) -> bytes:
        """The request for the rest."""
        self._given_tokens = self._num_tokens
        fields = dict(self._fields)
        text = "".join(self._text)
        self._given_chars = len(text)
        self._had_begun, self._had_role = self._id is not None, self._has_role
        if self._is_chat:
            if text:
                said = {"role": "assistant", "content": text}
                fields["messages"] = [*fields["messages"], said]
                fields |= {"continue_final_message": True, "add_generation_prompt": False}
        elif isinstance(fields["prompt"], str):
            fields["prompt"] += text
        else:
            fields["prompt"] = [*fields["prompt"], *self._token_ids]
        for name in _LIMITS:
            if isinstance(fields.get(name), int):
                least = 0 if name == "min_tokens" else 1
                fields[name] = max(least, fields[name] - self._num_tokens)
        return bodies.encode(fields)

    def continued(self, events: bytes) -> bytes:
        """Events of a stream that goes on with the first one, as the client should see them."""
        return b"".join(
            self._as_before(line) for line in events.splitlines() if line.startswith(_DATA)
        )

    def _as_before(self, line: bytes) -> bytes:
        data = line[len(_DATA) :].strip()
        try:
            event = bodies.decode(data)
        except ValueError:
            return line + b"\n\n"
        if not isinstance(event, dict):
            return line + b"\n\n"
        if "id" in event and self._id is not None:
            event["id"] = self._id
        if "created" in event and self._created is not None:
            event["created"] = self._created
        if self._had_begun:
            event.pop("prompt_token_ids", None)
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._correct_choice(choice)
        if isinstance(event.get("usage"), dict):
            self._correct(event["usage"])
        return _DATA + b" " + bodies.encode(event) + b"\n\n"

    def _correct(self, usage: dict[str, Any]) -> None:
        for name, change in (("prompt_tokens", -1), ("completion_tokens", 1)):
            if isinstance(usage.get(name), int):
                usage[name] += change * self._given_tokens
        # What was generated may be cached; it is no prompt of the client's.
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            most = usage.get("prompt_tokens", 0)
            details["cached_tokens"] = min(details["cached_tokens"], most)

    def _correct_choice(self, choice: dict[str, Any]) -> None:
        """What happens once has happened, and offsets count from the answer's beginning."""
        delta = choice.get("delta")
        if self._had_role and isinstance(delta, dict):
            delta.pop("role", None)
        if self._had_begun:
            choice.pop("prompt_token_ids", None)
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("text_offset"), list):
            logprobs["text_offset"] = [
                offset + self._given_chars for offset in logprobs["text_offset"]
            ]


def _can_be_resumed(fields: Mapping[str, Any], *, is_chat: bool) -> bool:
    if asks_for_any(fields, _STATEFUL):
        return False
    if fields.get("n", 1) != 1 or fields.get("best_of") not in (None, 1):
        return False
    if is_chat:
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages or fields.get("tools"):
            return False
        # Where the answer goes on with a message of the client's, there is no place for a second.
        last = messages[-1]
        return not fields.get("continue_final_message") and (
            isinstance(last, dict) and last.get("role") != "assistant"
        )
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        # Without the ids of what was generated nothing can be put behind ids.
        ids = all(isinstance(token, int) for token in prompt)
        return ids and bool(prompt) and bool(fields.get("return_token_ids"))
    return isinstance(prompt, str)
