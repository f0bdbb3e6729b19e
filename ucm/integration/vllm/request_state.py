"""What the scheduler side keeps of a request, from vLLM's first word of it to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ucm.integration.engine.prompt import Prompt


@dataclass(eq=False)
class RequestState:
    """`prompt` has keys once it is named. `local_tokens` is how much of it vLLM had itself when it
    last asked. `had_tokens` are those, or all up to the end of the last step that has computed
    some: the request's device blocks hold their KV."""

    request: Any
    prompt: Prompt
    local_tokens: int = 0
    had_tokens: int = 0

    @property
    def is_being_loaded(self) -> bool:
        """vLLM counts what is being loaded as computed, be it by another connector beside ours."""
        return int(self.request.num_computed_tokens) > self.had_tokens

    def computes(self, num_tokens: int) -> int:
        """A step computes so many more. How many of them are the prompt's."""
        computed = int(self.request.num_computed_tokens)
        self.had_tokens = computed + num_tokens
        return max(0, min(num_tokens, self.prompt.num_tokens - computed))
