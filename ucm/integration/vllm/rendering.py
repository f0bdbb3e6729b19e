"""What vLLM's own server makes of requests: their tokens, by the code that the server has for them.

A chat's tokens are made of more than its messages: of tools, of what the template is given, of the
server's flags. Where vLLM makes the renderer of its server has changed with its versions.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.version import __version__

from ucm.errors import UcmError
from ucm.store.inspect.given_prompts import GivenPrompt

# Where versions have it, the newest first.
_FLAGS: Final = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
_SERVERS: Final = (
    "vllm.entrypoints.launchers.render.app_state",
    "vllm.entrypoints.openai.api_server",
)
_RENDERERS: Final = ("online_renderer", "openai_serving_render")
# Kinds of parts of a message that are text, for vLLM.
_TEXT_PARTS: Final = frozenset(
    {"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"}
)


def flags_parser() -> FlexibleArgumentParser:
    """Of `vllm serve`, or, where vLLM has it elsewhere, of an engine alone."""
    add_all = _find("make_arg_parser", _FLAGS) or EngineArgs.add_cli_args
    parser: FlexibleArgumentParser = add_all(FlexibleArgumentParser(prog="vllm serve"))
    return parser


def tokens_of(
    vllm_config: Any, flags: Namespace, prompts: Sequence[GivenPrompt]
) -> list[list[int]]:
    """Of each prompt. Raises UcmError for a request that a server with these flags would refuse,
    or that tokens alone don't tell, and says which."""
    if all(isinstance(prompt.value, list) for prompt in prompts):
        return [prompt.value for prompt in prompts if isinstance(prompt.value, list)]
    return asyncio.run(_rendered(vllm_config, flags, prompts))


async def _rendered(
    vllm_config: Any, flags: Namespace, prompts: Sequence[GivenPrompt]
) -> list[list[int]]:
    renderer = await _renderer(vllm_config, flags)
    return [
        prompt.value
        if isinstance(prompt.value, list)
        else await _tokens_of(renderer, prompt.value, prompt.where)
        for prompt in prompts
    ]


async def _renderer(vllm_config: Any, flags: Namespace) -> Any:
    """Raises UcmError if this vLLM's is not known."""
    make = _find("init_render_app_state", _SERVERS)
    state = SimpleNamespace()
    if make is not None:
        _load_plugins(flags)
        await make(vllm_config, state, flags)
    renderer = next((vars(state)[name] for name in _RENDERERS if name in vars(state)), None)
    if not hasattr(renderer, "render_chat") or not hasattr(renderer, "render_completion"):
        raise UcmError(
            f"how vLLM {__version__} makes tokens of requests is not known here: give tokens, "
            f"which its server tells at /tokenize"
        )
    return renderer


def _load_plugins(flags: Namespace) -> None:
    """Parsers of their own that flags name, as the server loads them."""
    if flags.tool_parser_plugin:
        from vllm.tool_parsers import ToolParserManager

        ToolParserManager.import_tool_parser(flags.tool_parser_plugin)
    if flags.reasoning_parser_plugin:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(flags.reasoning_parser_plugin)


async def _tokens_of(renderer: Any, request: dict[str, Any], where: str) -> list[int]:
    _check_is_text(request, where)
    try:
        made = await _render(renderer, request)
    except Exception as error:
        raise UcmError(f"{where}: vLLM's server would refuse it: {_words(error)}") from error
    if len(made) != 1 or made[0].get("type") != "token":
        raise _not_text(where)
    return list(made[0]["prompt_token_ids"])


def _check_is_text(request: dict[str, Any], where: str) -> None:
    """Before vLLM fetches what a request names. Pure. Raises UcmError."""
    messages = request.get("messages") or []
    if messages and "system" in request:
        raise UcmError(
            f"{where}: is a request for /v1/messages, of which tokens can't be made: give it as "
            f"one for /v1/chat/completions, with `system` as its first message"
        )
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    kinds = [part.get("type", "text") for part in parts if isinstance(part, dict)]
    if request.get("prompt_embeds") or not _TEXT_PARTS.issuperset(map(str, kinds)):
        raise _not_text(where)


def _not_text(where: str) -> UcmError:
    return UcmError(
        f"{where}: has images, audio, video or embeddings, whose pages tokens alone don't name: "
        f"leave it out"
    )


async def _render(renderer: Any, request: dict[str, Any]) -> list[Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    # As long a prompt as there may be, where the request says nothing of its answer.
    given = {"max_tokens": 1, **request}
    if request.get("messages") is not None:
        made = await renderer.render_chat(ChatCompletionRequest.model_validate(given))
        return list(made[1]) if isinstance(made, tuple) else _refused(made)
    made = await renderer.render_completion(CompletionRequest.model_validate(given))
    return made if isinstance(made, list) else _refused(made)


def _refused(response: Any) -> list[Any]:
    raise UcmError(str(response.error.message))


def _words(error: Exception) -> str:
    """In one line. Of all that may be wrong with a field pydantic names every way to read it."""
    told = getattr(error, "errors", None)
    if callable(told) and (first := next(iter(told()), None)):
        place = ".".join(str(each) for each in first["loc"])
        return f"{place}: {first['msg']}"
    return " ".join(f"{error}".split())


def _find(name: str, modules: Sequence[str]) -> Any:
    """None if none of these has it."""
    found = (getattr(_imported(module), name, None) for module in modules)
    return next((each for each in found if each is not None), None)


def _imported(module: str) -> ModuleType | None:
    try:
        return import_module(module)
    except ImportError:
        return None
