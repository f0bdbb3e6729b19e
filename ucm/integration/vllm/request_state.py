"""What the scheduler side keeps of a request, from vLLM's first word of it to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ucm.integration.engine.prompt import Prompt


@dataclass(eq=False)
class RequestState:
    """`prompt` has keys once it is named. `local_tokens` is how much of it vLLM had itself when it
    last asked. `is_computed`: a step has computed with the device blocks that vLLM has given the
    request last. Before that something is being loaded into them, be it by another connector beside
    ours: vLLM counts that as computed, and frees them when it hears of the load."""

    request: Any
    prompt: Prompt
    local_tokens: int = 0
    is_computed: bool = False
    # With what was answered, as far as it was asked for.
    grown: Prompt | None = None

    def next_tokens(self, num_tokens: int) -> range:
        """Those that a step computes now, of the request's tokens."""
        start = int(self.request.num_computed_tokens)
        return range(start, start + num_tokens)

    def prompt_tokens(self, num_tokens: int) -> int:
        """Of the next `num_tokens`, how many are the prompt's."""
        left = self.prompt.num_tokens - int(self.request.num_computed_tokens)
        return max(0, min(num_tokens, left))

    def take_grown(self) -> Prompt | None:
        """The prompt with what is answered to it, where that has filled another block. The last
        token no step has computed, and guesses are none of the request's tokens before they are
        found right."""
        request, known = self.request, self.grown or self.prompt
        num_tokens = min(int(request.num_computed_tokens), int(request.num_tokens) - 1)
        if known.chain is None or num_tokens // known.block_tokens <= known.full_blocks:
            return None
        first_token = known.full_blocks * known.block_tokens
        self.grown = known.grown(request.all_token_ids[first_token:num_tokens])
        return self.grown
