"""What a prefill instance is asked, made from what the client has asked. Pure."""

from __future__ import annotations

import json

# They shape the output only, and contradict an answer of one token that is not streamed.
_DROPPED = ("stream_options", "min_tokens")


def prefill_body(body: bytes) -> bytes | None:
    """The request that computes the same prompt and as little else as there can be: one token.

    Everything that shapes the prompt stays as it is, in its order (tools end up in the prompt in
    the order of their keys). None if the body is no JSON object: it is for decode alone to answer.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    fields["max_tokens"] = 1
    if "max_completion_tokens" in fields:
        # It wins over max_tokens in chat requests.
        fields["max_completion_tokens"] = 1
    fields["stream"] = False
    for name in _DROPPED:
        fields.pop(name, None)
    return json.dumps(fields).encode()
