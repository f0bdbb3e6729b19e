"""Prompts that a tool is given."""

from __future__ import annotations

import io
import json
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
        GivenPrompt({"prompt": "a text"}),
        GivenPrompt([1, 2, 3]),
        GivenPrompt({"messages": CHAT}),
        GivenPrompt({"prompt": "b", "cache_salt": "s", "max_tokens": 5}, "s"),
        GivenPrompt({"messages": CHAT, "model": "m"}),
        GivenPrompt([4]),
    ]


def test_a_request_is_kept_whole_as_its_tokens_are_made_of_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    requests: list[dict[str, object]] = [
        {
            "messages": CHAT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
            "add_generation_prompt": False,
        },
        {"prompt": [1, 2, 3], "truncate_prompt_tokens": 2},
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in requests))
    assert [each.value for each in read_prompts(str(file))] == requests
    assert [each.where for each in read_prompts(str(file))] == [
        f"{file}: line {number}" for number in (1, 2)
    ]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_what_ends_a_line_elsewhere_may_be_inside_a_text(end: str, tmp_path: Path) -> None:
    """JSON has it there as it is, and its lines end at \n alone, or at \r\n."""
    file = tmp_path / "prompts.jsonl"
    text = f"a{end}b"
    line = json.dumps(text, ensure_ascii=False)
    file.write_bytes(f'{line}\r\n{line}\n{{"prompt": 3}}'.encode())
    with pytest.raises(UcmError, match="line 3: expected a text"):
        read_prompts(str(file))
    file.write_bytes(f"{line}\r\n{line}\n".encode())
    assert [each.value for each in read_prompts(str(file))] == [{"prompt": text}] * 2


@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_has_no_prompts_whatever_its_name(
    name: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UcmError, match="has no prompts: it is empty"):
        read_prompts(str(file))


def test_a_standard_input_that_is_closed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UcmError, match="standard input is closed"):
        read_prompts("-")


def test_other_files_have_one_prompt(tmp_path: Path) -> None:
    text, tokens = tmp_path / "prompt.txt", tmp_path / "prompt.json"
    text.write_text("[1, 2]\nand more")
    tokens.write_text("[1,\n 2]")
    assert read_prompts(str(text)) == [GivenPrompt({"prompt": "[1, 2]\nand more"})]
    assert read_prompts(str(tokens)) == [GivenPrompt([1, 2])]


def test_standard_input_has_one_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n"\xc3\xa4"\n')))
    assert read_prompts("-") == [GivenPrompt({"prompt": text}) for text in "aä"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ('""', "line 1: expected a text"),
        ('{"prompt": "a"}\n"\\ud800"', "line 2: has what no request can have"),
        ('{"prompt": "a", "cache_salt": "\\udfff"}', "line 1: has what no request can have"),
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
