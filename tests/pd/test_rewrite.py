"""The prefill leg's body."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.pd.rewrite import prefill_body


def rewritten(**fields):
    body = prefill_body(json.dumps(fields).encode())
    assert body is not None
    return json.loads(body)


def test_prefill_is_asked_for_one_token_that_is_not_streamed():
    assert {"prompt": "hi", "max_tokens": 1, "stream": False} == rewritten(
        prompt="hi", max_tokens=100, stream=True
    )


def test_a_request_without_max_tokens_still_asks_for_one_token():
    assert 1 == rewritten(prompt="hi")["max_tokens"]


def test_max_completion_tokens_is_capped_where_the_client_has_set_it():
    assert 1 == rewritten(messages=[], max_completion_tokens=100)["max_completion_tokens"]
    assert "max_completion_tokens" not in rewritten(messages=[])


@pytest.mark.parametrize("name", ["stream_options", "min_tokens"])
def test_fields_that_contradict_one_unstreamed_token_are_left_out(name):
    assert name not in rewritten(prompt="hi", **{name: 10})


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe"])
def test_what_is_no_json_object_is_not_for_prefill(body):
    assert prefill_body(body) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_everything_else_stays_as_it_is_and_in_its_order(fields):
    """Tools are rendered into the prompt in the order of their keys: sorting them would make
    prefill compute another prompt than decode looks up."""
    changed = {"max_tokens", "max_completion_tokens", "stream", "stream_options", "min_tokens"}
    kept = [(name, value) for name, value in fields.items() if name not in changed]

    assert kept == [(k, v) for k, v in rewritten(**fields).items() if k not in changed]
