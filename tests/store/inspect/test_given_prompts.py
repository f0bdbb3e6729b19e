"""Prompts that a tool is given."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from ucm.errors import UcmError
from ucm.store.inspect.given_prompts import GivenPrompt, read_prompts

CHAT = [{"role": "user", "content": "a"}]


def test_a_file_of_lines_has_texts_tokens_chats_and_requests(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '"a text"\n\n[1, 2, 3]\n[{"role": "user", "content": "a"}]\n'
        '{"prompt": "b", "cache_salt": "s", "max_tokens": 5}\n'
        '{"messages": [{"role": "user", "content": "a"}], "model": "m"}\n'
        '{"prompt": [4], "messages": null}'
    )
    assert read_prompts(str(file)) == [
        GivenPrompt("a text"),
        GivenPrompt([1, 2, 3]),
        GivenPrompt(CHAT),
        GivenPrompt("b", "s"),
        GivenPrompt(CHAT),
        GivenPrompt([4]),
    ]


def test_other_files_have_one_prompt(tmp_path: Path) -> None:
    text, tokens = tmp_path / "prompt.txt", tmp_path / "prompt.json"
    text.write_text("[1, 2]\nand more")
    tokens.write_text("[1,\n 2]")
    assert read_prompts(str(text)) == [GivenPrompt("[1, 2]\nand more")]
    assert read_prompts(str(tokens)) == [GivenPrompt([1, 2])]


def test_standard_input_has_one_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n"\xc3\xa4"\n')))
    assert read_prompts("-") == [GivenPrompt("a"), GivenPrompt("ä")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ('"a"\n{"prompt": 3}', "line 2: expected a text"),
        ('"a"\n{', "line 2: no prompt can be read"),
        ("[]", "line 1: expected a text"),
        ("[1, -2]", "line 1: expected a text"),
        ("[1, true]", "line 1: expected a text"),
        ('[1, "a"]', "line 1: expected a text"),
        ('{"messages": "a", "cache_salt": 3}', "line 1: expected a text"),
        ("[" * 100_000, "line 1: no prompt can be read"),
    ],
)
def test_what_is_no_prompt_is_one_line_that_says_where(
    text: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(UcmError) as error:
        read_prompts(str(file))
    assert said in str(error.value) and str(error.value).count("\n") == 0


def test_a_file_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UcmError, match="can't be read"):
        read_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UcmError, match="is not UTF-8"):
        read_prompts(str(tmp_path / "bytes.txt"))
