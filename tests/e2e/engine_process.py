"""An engine of any vLLM in a process of its own: it does what its standard input says, a line each,
and answers on its standard output.

    python tests/e2e/engine_process.py FLAGS [PLUGIN]

Its scheduler is in the same process, so a test sees what is left in it. FLAGS are vLLM's, as JSON.
PLUGIN is a module that is imported before the engine is made, as vLLM does with a platform's.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import time
from typing import Any

ANSWER = "ANSWER "
_DRAIN_S = 20.0


class Engine:
    def __init__(self, flags: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**flags)
        self._engine = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler

    def ask(self, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
        """All at once."""
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._llm.generate(asked, self._sampling(max_tokens), use_tqdm=False)
        return [
            {"tokens": list(each.outputs[0].token_ids), "cached": each.num_cached_tokens}
            for each in answers
        ]

    def see(self, shown: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        """A prompt with a picture: the tokens that vLLM makes of it, and the answer."""
        asked: Any = [_opened(shown)]
        (answer,) = self._llm.generate(asked, self._sampling(max_tokens), use_tqdm=False)
        return {
            "prompt": answer.prompt_token_ids,
            "tokens": list(answer.outputs[0].token_ids),
            "cached": answer.num_cached_tokens,
        }

    def name_of(self, shown: dict[str, Any]) -> str:
        """What vLLM calls a prompt's picture."""
        name = f"named-{time.monotonic_ns()}"
        self._engine.add_request(name, _opened(shown), self._sampling(1))
        (request,) = self._scheduler.requests.values()
        self._engine.abort_request([name])
        return str(request.mm_features[0].identifier)

    def abort(self, prompt: list[int]) -> int:
        """In the middle of its prompt. How much of it was computed."""
        name = f"aborted-{time.monotonic_ns()}"
        self._engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling(8))
        until_s = time.monotonic() + _DRAIN_S
        while not (computed := self._computed()) and time.monotonic() < until_s:
            self._engine.step()
        self._engine.abort_request([name])
        return computed

    def pause(self, prompt: list[int], max_tokens: int, mode: str, num_steps: int) -> list[int]:
        """After so many steps of it, and for some more. What is answered in the end."""
        core = self._engine.engine_core.engine_core
        name = f"paused-{time.monotonic_ns()}"
        given = self._sampling(max_tokens)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, given)
        tokens: list[int] = []
        outputs = [each for _ in range(num_steps) for each in self._engine.step()]
        core.pause_scheduler(mode, clear_cache=False)
        outputs += [each for _ in range(5) for each in self._engine.step()]
        core.resume_scheduler()
        until_s = time.monotonic() + _DRAIN_S
        while self._scheduler.get_num_unfinished_requests() and time.monotonic() < until_s:
            outputs += self._engine.step()
        if mode == "abort":
            # Here nobody tells the other half of the engine, as its process would.
            self._engine.abort_request([name])
        for each in outputs:
            tokens = list(each.outputs[0].token_ids)
        return tokens

    def sleep(self) -> None:
        core = self._engine.engine_core.engine_core
        core.sleep(level=1, mode="abort")
        core.wake_up()

    def _computed(self) -> int:
        return sum(each.num_computed_tokens for each in self._scheduler.running)

    def drain(self) -> list[str]:
        """What is left in the scheduler for good."""
        until_s = time.monotonic() + _DRAIN_S
        while self._scheduler.requests and time.monotonic() < until_s:
            self._engine.engine_core.engine_core.step()
        return list(self._scheduler.requests)

    def preemptions(self) -> int:
        found = [each for each in self._llm.get_metrics() if each.name == "vllm:num_preemptions"]
        return int(found[0].value)

    def connector(self) -> str:
        return type(self._scheduler.connector).__name__

    def version(self) -> str:
        import vllm

        return str(vllm.__version__)

    def _sampling(self, max_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def _opened(shown: dict[str, Any]) -> Any:
    """JSON has no pictures."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(shown["picture"])))
    return {**shown["fields"], "prompt": shown["text"], "multi_modal_data": {"image": picture}}


def main(flags: str, plugin: str = "") -> None:
    if plugin:
        importlib.import_module(plugin)
    engine = Engine(json.loads(flags))
    for line in sys.stdin:
        what, arguments = json.loads(line)
        answer = getattr(engine, what)(*arguments)
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
