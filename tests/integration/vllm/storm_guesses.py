"""The same storm where tokens are guessed: a step computes guesses behind the last token, and of a
wrong one the KV stays in the block until the right token's is written over it. After a hit that
leaves one token vLLM puts guesses behind it that are none (-1)."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import DraftTokenIds

from tests.integration.vllm.storm import Storm, _sampled, kv_of
from tests.integration.vllm.storm_engine import VOCABULARY


class GuessingStorm(Storm):
    wrong_guesses = 0
    right_guesses = 0

    def _forward(self, output: Any) -> dict[str, list[int]]:
        sampled = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            guesses = output.scheduled_spec_decode_tokens.get(name, [])
            tokens = [*request._all_token_ids, *guesses]
            end = request.num_computed_tokens
            sure = end - len(guesses)
            answer = [self._compute(name, tokens, end - count, sure)]
            for at, guess in enumerate(guesses, sure):
                token = self._compute(name, tokens, at, at + 1)
                # Behind a wrong one there is nothing right.
                if len(answer) == at - sure + 1 and answer[-1] == guess:
                    answer.append(token)
            self.right_guesses += len(answer) - 1
            self.wrong_guesses += len(guesses) - len(answer) + 1
            sampled[name] = answer if sure == request.num_tokens else []
        return sampled

    def _compute(self, name: str, tokens: list[int], start: int, end: int) -> int:
        blocks = self.scheduler.kv_cache_manager.get_block_ids(name)
        values = {rank.compute(tokens, blocks, start, end) for rank in self.ranks}
        return _sampled(values.pop()) if len(values) == 1 else -1

    def _update(self, output: Any, sampled: dict[str, list[int]]) -> None:
        super()._update(output, sampled)
        names = [name for name, tokens in sampled.items() if tokens]
        guesses = [self._guessed(name) for name in names]
        self.scheduler.update_draft_token_ids(DraftTokenIds(names, guesses))

    def _guessed(self, name: str) -> list[int]:
        guesses, value = [], self._truth[name][-1]
        for _ in range(self.rng.randint(0, self.weather.num_guesses)):
            is_right = self.rng.random() < 0.7
            guesses.append(_sampled(value) if is_right else self.rng.randrange(VOCABULARY))
            value = kv_of(value, guesses[-1])
        return guesses
