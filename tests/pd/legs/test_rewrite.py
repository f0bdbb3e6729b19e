"""The prefill leg's body, which requests have none, and what decode is told of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ucm.pd.legs.rewrite import (
    guess_tokens,
    most_tokens,
    params_of,
    parse_body,
    prefill_body,
    why_not_prefill,
    with_params,
    without_words,
)

COMPLETIONS = "/v1/completions"
OUTPUT_ONLY = [
    "stream_options",
    "min_tokens",
    "min_completion_tokens",
    "best_of",
    "use_beam_search",
    "logprobs",
    "top_logprobs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
]
WANTED = {"ucm": {"kind": "wanted"}}
CHANGED = {
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "stream",
    "kv_transfer_params",
    *OUTPUT_ONLY,
}


def rewritten(path=COMPLETIONS, **fields):
    return json.loads(prefill_body(fields, path=path))


def test_prefill_is_asked_for_one_token_that_is_not_streamed():
    got = rewritten(prompt="hi", max_tokens=100, stream=True)
    assert WANTED == got.pop("kv_transfer_params")
    assert {"prompt": "hi", "max_tokens": 1, "stream": False} == got


def test_a_request_without_max_tokens_still_asks_for_one_token():
    assert 1 == rewritten(prompt="hi")["max_tokens"]


@pytest.mark.parametrize("name", ["max_completion_tokens", "n"])
def test_what_asks_for_more_output_is_brought_to_one_where_the_client_has_set_it(name):
    assert 1 == rewritten(messages=[], **{name: 100})[name]
    assert name not in rewritten(messages=[])


def test_a_response_is_limited_by_its_own_name_and_not_kept():
    got = rewritten("/v1/responses", input="hi", max_output_tokens=100)
    assert WANTED == got.pop("kv_transfer_params")
    assert {"input": "hi", "max_output_tokens": 1, "store": False, "stream": False} == got


@pytest.mark.parametrize("name", OUTPUT_ONLY)
def test_fields_about_the_output_alone_are_left_out(name):
    assert name not in rewritten(prompt="hi", **{name: 10})


def test_prefill_is_asked_for_a_receipt_whatever_the_client_wants_of_it():
    got = rewritten(prompt="hi", kv_transfer_params={"do_remote_decode": True})
    assert WANTED == got["kv_transfer_params"]


def test_what_shapes_the_prompt_stays():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    fields = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, image]}],
        "tools": [{"type": "function", "function": {"z": 1, "a": {"y": 2, "b": 3}}}],
        "tool_choice": "required",
        "cache_salt": "mine",
        "chat_template_kwargs": {"enable_thinking": False},
        "truncate_prompt_tokens": 100,
        "model": "adapter",
    }
    got = rewritten("/v1/chat/completions", **fields)
    assert json.dumps(fields) == json.dumps({k: v for k, v in got.items() if k not in CHANGED})


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe", b"[" * 9999])
def test_what_is_no_json_object_has_no_fields(body):
    assert parse_body(body) is None


@pytest.mark.parametrize("body", [b'{"a": NaN}', b'{"a": "\\ud800"}'])
def test_what_vllm_reads_the_proxy_reads_too(body):
    assert parse_body(body) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_everything_else_stays_as_it_is_and_in_its_order(fields):
    """Tools are rendered into the prompt in the order of their keys: sorting them would make
    prefill compute another prompt than decode looks up."""
    kept = [(name, value) for name, value in fields.items() if name not in CHANGED]

    read = parse_body(json.dumps(fields).encode())
    first = json.loads(prefill_body(read, path=COMPLETIONS))
    assert kept == [(k, v) for k, v in first.items() if k not in CHANGED]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompt": "x" * 126}, "short"),
        ({"prompt": "x" * 127}, None),
        ({"prompt": [1] * 127}, "short"),
        ({"prompt": [1] * 128}, None),
        ({"prompt": ["a", "b"]}, "short"),
        ({"prompt": [[1, 2], [3]]}, "short"),
        ({"prompt": ["a", "x" * 300]}, None),
        ({"prompt": [[5], [1] * 300]}, None),
        ({"prompt": [[5], {"odd": 1}]}, None),
        ({"token_ids": [1] * 127, "sampling_params": {}}, "short"),
        ({"token_ids": [1] * 128, "sampling_params": {}}, None),
        ({"token_ids": [1] * 128, "sampling_params": {"prompt_logprobs": 1}}, "about_prompt"),
        ({"input": "x" * 500, "previous_response_id": "r"}, "continued"),
        ({"input": "x" * 500, "truncation": "auto"}, "truncated"),
        ({"input": "x" * 500, "truncation": "disabled"}, None),
        ({"prompt": ["a", "x" * 127]}, None),
        ({"prompt": []}, "short"),
        ({"messages": [{"role": "user", "content": "hi"}]}, None),
        ({"prompt": "x" * 500, "prompt_logprobs": 1}, "about_prompt"),
        ({"prompt": "x" * 500, "prompt_logprobs": 0}, "about_prompt"),
        ({"prompt": "x" * 500, "echo": True}, "about_prompt"),
        ({"prompt": "x" * 500, "echo": False}, None),
        ({"prompt": "x" * 500, "truncate_prompt_tokens": -1}, "truncated"),
    ],
)
def test_prefill_is_skipped_only_where_it_is_surely_of_no_use(fields, why):
    assert why == why_not_prefill(fields, min_tokens=128)


@given(st.text())
def test_a_token_of_text_is_at_least_a_byte(text):
    assert most_tokens({"prompt": text}) > len(text.encode(errors="replace"))


@given(st.dictionaries(st.sampled_from(["prompt", "messages", "input", "tools"]), json_values))
def test_any_prompt_has_a_size(fields):
    assert guess_tokens(fields) >= 1


blanks = st.text(" \t\r\n", max_size=3)


@st.composite
def objects(draw):
    """JSON objects as bytes, with blanks wherever they may be."""
    names = st.sampled_from(["kv_transfer_params", "prompt"]) | st.text()
    fields = draw(st.dictionaries(names, json_values))
    text = json.dumps(
        fields,
        indent=draw(st.none() | st.integers(0, 3)),
        separators=(draw(blanks) + "," + draw(blanks), draw(blanks) + ":" + draw(blanks)),
        ensure_ascii=draw(st.booleans()),
    )
    return f"{draw(blanks)}{text[:-1]}{draw(blanks)}}}{draw(blanks)}".encode()


@given(objects(), objects())
def test_decode_gets_the_clients_bytes_and_the_params_behind_the_last_field(body, params):
    params = params.strip()
    told = with_params(body, params)

    before, after = body[: body.rindex(b"}")], body[body.rindex(b"}") :]
    assert told.startswith(before)
    assert told.endswith(params + after)
    assert {**json.loads(body), "kv_transfer_params": json.loads(params)} == json.loads(told)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_body_that_is_not_utf_8_stays_as_it_is(encoding):
    body = '{"prompt": "hi"}'.encode(encoding)
    assert body == with_params(body, b"{}")


@given(objects())
def test_the_params_of_an_answer_are_found_byte_by_byte(params):
    params = params.strip()
    assume(b"Infinity" not in params)  # which is no JSON
    assert params == params_of(b'{"id": "a", "kv_transfer_params":\n' + params + b', "n": []}')


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no",
        b"[]",
        b"{}",
        b'{"choices": [{"kv_transfer_params": {}}]}',
        b'{"kv_transfer_params": null}',
        b'{"kv_transfer_params": [1]}',
        b'{"kv_transfer_params": "{}"}',
        b'{"kv_transfer_params": {"a": "\xff"}}',
        b'{"kv_transfer_params": {"a": \x01}}',
        b'{"kv_transfer_params": {"a": 1}',
        b'{"kv_transfer_params": ' + b'{"a":' * 9999,
    ],
)
def test_what_is_no_object_is_not_passed_to_decode(answer):
    assert params_of(answer) is None


def test_a_prefill_of_generate_makes_one_token():
    sampling = {"max_tokens": 50, "min_tokens": 5, "n": 3, "temperature": 0.5, "logprobs": 2}
    first = json.loads(
        prefill_body(
            {"token_ids": [1], "sampling_params": sampling, "stream": True},
            path="/inference/v1/generate",
        )
    )
    assert {"max_tokens": 1, "n": 1, "temperature": 0.5} == first["sampling_params"]
    assert "max_tokens" not in first and first["stream"] is False


def test_a_prefill_of_messages_may_think_for_longer_than_it_may_speak():
    """vLLM checks the two against each other, but in a prefill that says what it is."""
    protocol = pytest.importorskip("vllm.entrypoints.anthropic.protocol")
    fields = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4096,
        "thinking": {"type": "enabled", "budget_tokens": 2000},
    }
    first = json.loads(prefill_body(fields, path="/v1/messages"))
    assert 1 == protocol.AnthropicMessagesRequest(**first).max_tokens
    assert {"kind": "wanted"} == first["kv_transfer_params"]["ucm"]


def test_a_prefill_of_what_is_made_in_the_background_is_not():
    first = json.loads(prefill_body({"input": "hi", "background": True}, path="/v1/responses"))
    assert first["store"] is False and "background" not in first


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("others", [{}, {"theirs": {"a": 1}}])
def test_what_a_client_puts_in_the_proxys_place_reaches_no_engine(encoding, others):
    params = {"ucm": {"kind": "expected"}, **others}
    body = json.dumps({"prompt": "hi", "kv_transfer_params": params}).encode(encoding)

    changed, fields = without_words(body, parse_body(body))
    assert (others or None) == json.loads(changed)["kv_transfer_params"]
    assert json.loads(changed) == fields


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "A" * 5_000_000}},
        {"type": "input_audio", "input_audio": {"data": "A" * 5_000_000, "format": "wav"}},
        {"type": "file", "file": {"file_data": "A" * 5_000_000}},
        {"type": "document", "source": {"type": "base64", "data": "A" * 5_000_000}},
        {"type": "image", "source": {"type": "base64", "data": "A" * 5_000_000}},
        {"type": "odd", "odd": {"url": "data:video/mp4;base64," + "A" * 5_000_000}},
    ],
)
def test_media_weigh_as_media_and_not_as_the_text_that_carries_them(part):
    assert 100 < guess_tokens({"messages": [{"role": "user", "content": [part]}]}) < 20_000


def test_tools_and_a_system_prompt_weigh_as_well():
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000}}]
    short = {"messages": [{"role": "user", "content": "hi"}]}
    assert guess_tokens({**short, "tools": tools}) >= 1000
    assert guess_tokens({**short, "system": "x" * 4000}) >= 1000
