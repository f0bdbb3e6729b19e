"""Large bodies, and bodies in other scripts: no longer for the engines, and in nobody's way."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pd.conftest import Fleet
from ucm.pd.legs import bodies
from ucm.pd.legs.resume import Tracker

CHINESE = "请把下面的文章翻译成英文。"
# More than what is handled on the loop.
LARGE = "x" * (3 << 20)
# What the two legs say besides.
ROOM_BYTES = 400


@pytest.mark.parametrize("text", [CHINESE, "Ünïcödé ", "🙂", 'a "b" \\ \n', "\x7f\u2028"])
@pytest.mark.parametrize("handoff", ["chain", "overlap"])
async def test_no_leg_is_longer_than_what_the_client_sent(fleet: Fleet, text: str, handoff: str):
    await fleet.start(1, 1, handoff=handoff)
    said = text * 2000
    for path, fields in (
        ("v1/completions", {"prompt": said}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": said}]}),
        ("v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": said}]}),
    ):
        body = json.dumps({"model": text, **fields}, ensure_ascii=False).encode()
        async with fleet.client.post(fleet.proxy / path, data=body) as response:
            assert 200 == response.status
        for engine in (*fleet.prefill, *fleet.decode):
            asked = engine.asked[-1]
            assert len(asked.body) <= len(body) + ROOM_BYTES
            assert (text, said) == (asked.fields["model"], _said(asked.fields))


def _said(fields: dict) -> str:
    return fields["prompt"] if "prompt" in fields else fields["messages"][0]["content"]


def test_the_request_for_the_rest_of_a_stream_is_no_longer_than_its_text():
    prompt = CHINESE * 2000
    tracker = Tracker({"prompt": prompt, "stream": True}, is_chat=False)
    event = json.dumps({"id": "1", "choices": [{"index": 0, "text": CHINESE}]})
    tracker.add(f"data: {event}\n\n".encode())

    body = tracker.body()
    assert prompt + CHINESE == json.loads(body)["prompt"]
    assert len(body) <= len((prompt + CHINESE).encode()) + ROOM_BYTES
    seen = tracker.continued(f"data: {event}\n\n".encode())
    assert CHINESE.encode() in seen


numbers = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-1E400", "0.1", "1e5", "-0.0"])
texts = st.sampled_from(['"\\ud800"', '"\\ud83d\\ude42"', '"é"', '"\\u0000"', '"\\udc00x"'])
leaves = numbers | texts | st.integers().map(str) | st.sampled_from(["null", "true", "[]", "{}"])
documents = st.recursive(
    leaves,
    lambda each: (
        st.lists(each, max_size=3).map(lambda inner: f"[{','.join(inner)}]")
        | st.lists(each, max_size=3).map(
            lambda inner: "{" + ",".join(f'"k{i}": {v}' for i, v in enumerate(inner)) + "}"
        )
    ),
    max_leaves=8,
)


@given(documents)
def test_whatever_can_be_read_is_written_with_the_same_meaning(document: str):
    written = bodies.encode(bodies.decode(document.encode()))
    assert repr(json.loads(document)) == repr(json.loads(written))


@contextmanager
def work_on_this_thread() -> Iterator[set[str]]:
    """Names of the proxy's functions that take longer with a longer body, as they are called on the
    thread of this, which is the event loop's."""
    heavy = {"decode", "encode", "parse_body", "prefill_body", "guess_tokens", "with_params"}
    heavy |= {"without_words", "without_ours", "may_have_words"}
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and "/ucm/pd/" in code.co_filename and code.co_name in heavy:
            called.add(code.co_name)

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("handoff", ["chain", "overlap"])
@pytest.mark.parametrize("path", ["v1/completions", "v1/messages", "tokenize"])
async def test_large_bodies_are_read_and_written_off_the_loop(
    fleet: Fleet, handoff: str, path: str
):
    await fleet.start(1, 1, handoff=handoff)
    fields = {"prompt": LARGE, "messages": [{"role": "user", "content": LARGE}]}

    async def asked(fields: dict[str, object]) -> set[str]:
        body = json.dumps(fields).encode()
        with work_on_this_thread() as called:
            async with fleet.client.post(fleet.proxy / path, data=BytesIO(body)) as response:
                assert 200 == response.status
        return called

    assert set() == await asked(fields)
    # That it would have been seen, a small one shows.
    small = await asked({"prompt": "hi"})
    assert {"may_have_words", "decode"} & small
