"""What shapes the output alone makes no other prompt of one, and whatever else is there does."""

from __future__ import annotations

import importlib
import json

import pytest

from ucm.pd.legs.reading import read_request
from ucm.pd.legs.rewrite import prefill_fields
from ucm.pd.legs.shaping import NOT_OF_THE_PROMPT

LONG = "why? " * 900
# By their meaning: what stands in the prompt, how it is written, or whose pages are taken.
SHAPING = {
    *("messages", "prompt", "prompt_embeds", "input", "token_ids", "system", "instructions"),
    *("model", "cache_salt", "tools", "tool_choice", "documents", "add_special_tokens"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    *("media_io_kwargs", "mm_processor_kwargs", "features", "content_parts", "suffix"),
    *("truncate_prompt_tokens", "truncation_side", "truncation", "previous_response_id"),
    *("previous_input_messages", "reasoning", "reasoning_effort", "thinking", "output_config"),
}
# Nobody can say of them that they don't: what is in them is for plugins, or not only of the output.
UNCLEAR = {"vllm_xargs", "extra_args", "ec_transfer_params", "text", "skip_reading_prefix_cache"}
REQUESTS = {
    "openai.chat_completion": ["ChatCompletionRequest", "BatchChatCompletionRequest"],
    "openai.completion": ["CompletionRequest"],
    "openai.responses": ["ResponsesRequest"],
    "anthropic": ["AnthropicMessagesRequest"],
    "scale_out.token_in_token_out": ["GenerateRequest"],
}


def opening(**more: object) -> bytes:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": LONG}], **more})
    wanted = read_request(
        body.encode(), "/v1/chat/completions", min_tokens=0, has_prefill=True, places_from=0
    )
    assert wanted is not None and wanted.prefix is not None
    return wanted.prefix.opening


def dropped(path: str, names: set[str]) -> set[str]:
    return names - prefill_fields(dict.fromkeys(names), path=path).keys()


@pytest.mark.parametrize("house", REQUESTS)
def test_of_each_field_of_vllms_requests_is_known_whether_it_may_shape_the_prompt(house: str):
    pytest.importorskip("vllm")
    try:
        protocol = importlib.import_module(f"vllm.entrypoints.{house}.protocol")
    except ModuleNotFoundError:
        pytest.skip("this version of vLLM has its requests elsewhere")
    for name in REQUESTS[house]:
        fields = set(getattr(protocol, name).model_fields)
        left_out = dropped("/v1/completions", fields)
        assert len(fields) > 10
        # That one is looked into.
        fields.discard("sampling_params")
        assert set() == fields - SHAPING - UNCLEAR - NOT_OF_THE_PROMPT - left_out, name


def test_of_each_sampling_parameter_of_vllm_is_known_that_it_shapes_no_prompt():
    vllm = pytest.importorskip("vllm")
    fields = {name for name in vllm.SamplingParams.__struct_fields__ if not name.startswith("_")}
    # Nobody sends these.
    fields -= {"skip_clone", "output_text_buffer_length"}
    assert set() == fields - UNCLEAR - NOT_OF_THE_PROMPT


def test_nothing_that_shapes_a_prompt_is_taken_for_what_does_not():
    assert set() == NOT_OF_THE_PROMPT & (SHAPING | UNCLEAR)


@pytest.mark.parametrize("name", sorted(NOT_OF_THE_PROMPT))
def test_a_conversation_in_which_only_its_output_is_shaped_otherwise_is_the_same(name: str):
    # A client's words for another connector are not for the proxy.
    assert opening(**{name: {"a": 1}}) == opening(**{name: {"a": 2}}) == opening()


@pytest.mark.parametrize("name", sorted((SHAPING | UNCLEAR | {"unheard_of"}) - {"messages"}))
def test_whatever_else_a_request_says_makes_another_conversation_of_it(name: str):
    assert opening(**{name: "1"}) != opening(**{name: "2"})


def test_sampling_in_an_object_of_its_own_is_looked_into():
    def of_ids(**sampling: object) -> bytes:
        fields = {"token_ids": [1] * 600, "sampling_params": sampling}
        wanted = read_request(
            json.dumps(fields).encode(),
            "/inference/v1/generate",
            min_tokens=0,
            has_prefill=True,
            places_from=0,
        )
        assert wanted is not None and wanted.prefix is not None
        return wanted.prefix.opening

    assert of_ids() == of_ids(temperature=0.5, top_k=3, seed=1)
    assert of_ids() != of_ids(extra_args={"a": 1})
