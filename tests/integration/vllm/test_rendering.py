"""Requests become the tokens that vLLM's own server makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tokenizers import Tokenizer

from examples.cluster.models import SHAPES, model_config, write_json, write_tokenizer
from ucm.errors import UcmError
from ucm.integration.vllm import rendering
from ucm.integration.vllm.describe import describe
from ucm.store.inspect.engine_identity import EngineQuestion
from ucm.store.inspect.given_prompts import GivenPrompt

TEMPLATE = (
    "{% for tool in tools or [] %}<{{ tool['function']['name'] }}>{% endfor %}"
    "{% for document in documents or [] %}[{{ document['text'] }}]{% endfor %}"
    "{% if is_short %}short {% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(folder, chat_template=TEMPLATE)
    config = model_config(SHAPES["tiny"], vocab_size=tokenizer.get_vocab_size(), end_id=0)
    write_json(folder / "config.json", config)
    # There are no weights to know it by.
    (folder / "ucm.yaml").write_text(
        "model_id: chats\n"
        "ucm_connectors:\n"
        "  - ucm_connector_name: UcmPipelineStore\n"
        "    ucm_connector_config: {storage_backends: /nowhere}\n"
    )
    return folder


def tokens(model: Path, *values: Any, flags: tuple[str, ...] = ()) -> list[list[int]]:
    prompts = [GivenPrompt(value, where=f"line {n}") for n, value in enumerate(values, 1)]
    given = ["--max-model-len", "512", *flags]
    question = EngineQuestion(
        model=str(model),
        vllm_args=given,
        config_file=str(model / "ucm.yaml"),
        prompts=prompts,
        adapters=[],
    )
    return describe(question).tokens


def text_of(model: Path, made: list[int]) -> str:
    return Tokenizer.from_file(str(model / "tokenizer.json")).decode(made)


def test_a_text_in_parts_is_the_text(model: Path) -> None:
    parts = [{"type": "text", "text": "hello"}]
    plain, in_parts, tokens_alone = tokens(
        model,
        {"messages": [HELLO]},
        {"messages": [{"role": "user", "content": parts}]},
        [1, 2, 3],
    )
    assert text_of(model, plain) == "user: hello\nassistant: "
    assert in_parts == plain and tokens_alone == [1, 2, 3]


def test_all_of_a_request_that_its_template_is_given_is_in_its_tokens(model: Path) -> None:
    answer = {"role": "assistant", "content": "well"}
    requests = {
        "<find>user: hello\nassistant: ": {"messages": [HELLO], "tools": [TOOL]},
        "short user: hello\nassistant: ": {
            "messages": [HELLO],
            "chat_template_kwargs": {"is_short": True},
        },
        "[read]user: hello\nassistant: ": {
            "messages": [HELLO],
            "documents": [{"title": "a", "text": "read"}],
        },
        "user: hello\n": {"messages": [HELLO], "add_generation_prompt": False},
        "user: hello\nassistant: well": {
            "messages": [HELLO, answer],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
        "hello": {"messages": [HELLO], "chat_template": "{{ messages[0]['content'] }}"},
        "a text": {"prompt": "a text", "max_tokens": 5},
    }
    flags = (*TOOLS, "--trust-request-chat-template")
    made = tokens(model, *requests.values(), flags=flags)
    assert [text_of(model, each) for each in made] == list(requests)


def test_flags_of_the_server_count_as_it_has_them(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    flags = ("--chat-template", str(template), "--port", "8000", "--served-model-name", "m")
    (made,) = tokens(model, {"messages": [HELLO], "model": "m"}, flags=flags)
    assert text_of(model, made) == "hello"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "has images, audio, video"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "has images, audio, video or embeddings"),
        ({"messages": [HELLO], "system": "be short"}, "is a request for /v1/messages"),
        ({"messages": [HELLO], "tools": [TOOL]}, "--enable-auto-tool-choice"),
        ({"messages": [HELLO], "tools": [{}]}, "tools.0.function: Field required"),
        ({"messages": [HELLO], "chat_template": "a"}, "--trust-request-chat-template"),
        ({"prompt": "hello " * 600}, "maximum context length"),
    ],
)
def test_what_a_server_refuses_or_tokens_do_not_tell_is_refused_by_its_line(
    model: Path, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(UcmError) as error:
        tokens(model, [1], request_)
    assert str(error.value).startswith("line 2: ") and said in str(error.value)
    assert str(error.value).count("\n") == 0


def test_of_a_vllm_that_is_not_known_tokens_alone_are_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than making tokens in some way that may not be its server's."""
    monkeypatch.setattr(rendering, "_SERVERS", ("vllm.none",))
    monkeypatch.setattr(rendering, "_FLAGS", ("vllm.none",))
    assert tokens(model, [1, 2]) == [[1, 2]]
    with pytest.raises(UcmError, match="is not known here: give tokens"):
        tokens(model, {"prompt": "a"})


def test_another_model_behind_the_flags_is_told(model: Path) -> None:
    assert tokens(model, [1], flags=(str(model),)) == [[1]]
    with pytest.raises(UcmError, match="is behind -- and no flag"):
        tokens(model, [1], flags=("other",))
