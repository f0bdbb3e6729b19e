"""Whose words a client understands: of errors, and of the end of a stream. Pure.

A break has to look like one in every protocol. Where events are known, an error event says it;
where they are not, the connection ends inside the body, which no client takes for an end. A stream
is whole when its last event has come, however its connection ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
# Several conversations at once, each of them a prompt: vLLM's own.
CHAT_BATCH = "/v1/chat/completions/batch"
# A chat or a completion, whichever its body is, or something else: SageMaker's.
INVOCATIONS = "/invocations"
# Token ids in, token ids out: vLLM's own.
GENERATE = "/inference/v1/generate"
# A stream of these can go on at another instance.
RESUMABLE = (COMPLETIONS, CHAT)
# These have both legs.
GENERATING = (COMPLETIONS, CHAT, CHAT_BATCH, RESPONSES, MESSAGES, GENERATE, INVOCATIONS)
_WITH_DONE = (COMPLETIONS, CHAT, GENERATE, "/v1/audio/transcriptions", "/v1/audio/translations")


@dataclass(frozen=True)
class Protocol:
    """`last_event` finds the event after which nothing is missing, `error_head` is what stands
    before an error's data. Both are None where its streams are not known."""

    last_event: re.Pattern[bytes] | None = None
    error_head: bytes | None = None
    is_anthropic: bool = False

    def error_body(self, code: int, message: str) -> bytes:
        if self.is_anthropic:
            kind = _ANTHROPIC_TYPES.get(code, "api_error" if code >= 500 else _ANTHROPIC_TYPES[400])
            return msgspec.json.encode({"type": "error", "error": _typed(kind, message)})
        kind = _TYPES.get(code, "InternalServerError" if code >= 500 else "BadRequestError")
        return msgspec.json.encode(
            {"error": {"message": message, "type": kind, "param": None, "code": code}}
        )

    def error_event(self, code: int, message: str) -> bytes | None:
        """None: there is no telling such a client but by the connection's end."""
        if self.error_head is None:
            return None
        return self.error_head + self.error_body(code, message) + b"\n\n"

    def is_last(self, events: bytes) -> bool:
        return self.last_event is not None and self.last_event.search(events) is not None


def _typed(kind: str, message: str) -> dict[str, str]:
    return {"type": kind, "message": message}


# Lines begin so nowhere else: inside of JSON there are no line ends.
_OPENAI = Protocol(re.compile(rb"^data: ?\[DONE\]", re.MULTILINE), b"data: ")
_RESPONSES = Protocol(
    re.compile(
        rb"^event: ?(response\.(completed|incomplete|failed|cancelled)|error)\s*$"
        rb"|^data: ?(\[DONE\]|\{\"error\":)",
        re.MULTILINE,
    ),
    b"event: error\ndata: ",
)
_ANTHROPIC = Protocol(
    re.compile(rb"^event: ?(message_stop|error)\s*$", re.MULTILINE),
    b"event: error\ndata: ",
    is_anthropic=True,
)
_UNKNOWN = Protocol()


def protocol_of(path: str) -> Protocol:
    """Of a request's path, without its query."""
    if path == MESSAGES or path.startswith(MESSAGES + "/"):
        return _ANTHROPIC
    if path == RESPONSES or path.startswith(RESPONSES + "/"):
        return _RESPONSES
    return _OPENAI if path in _WITH_DONE else _UNKNOWN
