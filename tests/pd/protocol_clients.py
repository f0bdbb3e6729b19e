"""The clients that people use, each asked for the text that its user would have."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx2
import openai

Call = Callable[[str, bool], Awaitable[str]]
QUESTION: Any = [{"role": "user", "content": "hi"}]
PATIENCE_S = 20.0
# litellm's are openai's.
ERRORS = (openai.OpenAIError, anthropic.AnthropicError, httpx2.HTTPError)


def _openai(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}v1", api_key="k", max_retries=0, timeout=PATIENCE_S)


async def _openai_completions(url: str, stream: bool) -> str:
    async with _openai(url) as client:
        made: Any = await client.completions.create(model="m", prompt="hi", stream=stream)
        if not stream:
            return str(made.choices[0].text)
        return "".join([each.choices[0].text async for each in made])


async def _openai_chat(url: str, stream: bool) -> str:
    async with _openai(url) as client:
        made: Any = await client.chat.completions.create(
            model="m", messages=QUESTION, stream=stream
        )
        if not stream:
            return str(made.choices[0].message.content)
        return "".join([each.choices[0].delta.content async for each in made])


async def _openai_responses(url: str, stream: bool) -> str:
    async with _openai(url) as client:
        made: Any = await client.responses.create(model="m", input="hi", stream=stream)
        if not stream:
            return str(made.output_text)
        deltas = [e.delta async for e in made if e.type == "response.output_text.delta"]
        return "".join(deltas)


async def _anthropic_messages(url: str, stream: bool) -> str:
    async with anthropic.AsyncAnthropic(
        base_url=url.rstrip("/"), api_key="k", max_retries=0, timeout=PATIENCE_S
    ) as client:
        asked: Any = {"model": "m", "messages": QUESTION, "max_tokens": 9}
        if not stream:
            made = await client.messages.create(**asked)
        else:
            async with client.messages.stream(**asked) as events:
                made = await events.get_final_message()
        return "".join(getattr(block, "text", "") for block in made.content)


def _litellm() -> Any:
    # Otherwise it asks the internet for prices when it is imported.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    return litellm


async def _litellm_chat(url: str, stream: bool, *, provider: str, base: str) -> str:
    made = await _litellm().acompletion(
        model=f"{provider}/m",
        messages=QUESTION,
        api_base=base,
        api_key="k",
        stream=stream,
        num_retries=0,
        max_retries=0,
        max_tokens=9,
        timeout=PATIENCE_S,
    )
    if not stream:
        return str(made.choices[0].message.content)
    return "".join([each.choices[0].delta.content or "" async for each in made])


async def _litellm_openai(url: str, stream: bool) -> str:
    return await _litellm_chat(url, stream, provider="openai", base=f"{url}v1")


async def _litellm_anthropic(url: str, stream: bool) -> str:
    return await _litellm_chat(url, stream, provider="anthropic", base=url.rstrip("/"))


async def _litellm_completions(url: str, stream: bool) -> str:
    made = await _litellm().atext_completion(
        model="text-completion-openai/m",
        prompt="hi",
        api_base=f"{url}v1",
        api_key="k",
        stream=stream,
        max_retries=0,
        timeout=PATIENCE_S,
    )
    if not stream:
        return str(made.choices[0].text)
    return "".join([each.choices[0].text or "" async for each in made])


CLIENTS: dict[str, tuple[str, Call]] = {
    "openai completions": ("/v1/completions", _openai_completions),
    "openai chat": ("/v1/chat/completions", _openai_chat),
    "openai responses": ("/v1/responses", _openai_responses),
    "anthropic messages": ("/v1/messages", _anthropic_messages),
    "litellm completions": ("/v1/completions", _litellm_completions),
    "litellm chat": ("/v1/chat/completions", _litellm_openai),
    "litellm messages": ("/v1/messages", _litellm_anthropic),
}
