"""Which fields of a request may shape its prompt: all but those that are known not to. Pure.

A field that is missing here makes another prompt of the same one, which costs a prefill or a place;
one that is here and shapes the prompt would be worse. So whatever is not known to vLLM counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# How tokens are chosen, and when the last one has come.
_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "use_beam_search"}
    | {"presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"}
    | {"repetition_detection", "logit_bias", "allowed_token_ids", "bad_words", "watermarking"}
    | {"stop", "stop_sequences", "stop_token_ids", "ignore_eos", "early_stopping"}
    | {"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"}
    | {"max_tool_calls", "thinking_token_budget", "trace_decode_token_ids", "structured_outputs"}
    | {"guided_decoding_backend", "guided_whitespace_pattern"}
)
# What is said of the tokens, and how.
_ANSWER = frozenset(
    {"stream", "stream_interval", "stream_options", "output_mode", "include", "echo"}
    | {"include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}
    | {"include_reasoning", "parallel_tool_calls", "enable_response_messages", "detokenize"}
    | {"logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs"}
    | {"prompt_logprob_token_ids", "prompt_logprob_start", "routed_experts_prompt_start"}
    | {"return_token_ids", "return_token_offsets", "return_tokens_as_token_ids"}
    | {"return_prompt_text", "return_mm_kwargs", "mm_payload", "token_offsets", "output_kind"}
    | {"reasoning_ended", "reasoning_parser_kwargs"}
)
# Whose request it is, and how it is served.
_SERVICE = frozenset(
    {"user", "metadata", "request_id", "session_id", "priority", "service_tier", "store"}
    | {"background", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"kv_transfer_params"}
)
NOT_OF_THE_PROMPT: Final = _SAMPLING | _ANSWER | _SERVICE


def shaping(fields: Mapping[str, Any], *, but: str) -> list[tuple[str, Any]]:
    """Fields that may shape the prompt, with what they say, in one order; without that `but`."""
    names = sorted(fields.keys() - NOT_OF_THE_PROMPT - {but})
    return [(name, _value(name, fields[name])) for name in names]


def _value(name: str, value: Any) -> Any:
    # /inference/v1/generate has its sampling in an object of its own.
    is_sampling = name == "sampling_params" and isinstance(value, dict)
    return shaping(value, but="") if is_sampling else value
