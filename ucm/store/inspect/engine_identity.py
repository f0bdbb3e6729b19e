"""What only vLLM can tell of an engine and a prompt, on its way between two processes as JSON.

The `ucm` command runs without vLLM. What it must know of an engine it asks of a process that has
it: `python -m ucm.integration.vllm.describe`, with a question as its argument and the number of a
descriptor to answer on, as vLLM prints to standard output what it likes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Final

import msgspec

from ucm.errors import UcmError

DESCRIBER: Final = "ucm.integration.vllm.describe"

_LAST_LINES: Final = 3


class EngineQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """`vllm_args` are flags of `vllm serve`, without the model. `config_file`: the settings, empty
    for defaults. `prompt_file` may be empty, and so may be `adapters`, folders of LoRA adapters."""

    model: str
    vllm_args: list[str]
    config_file: str
    prompt_file: str
    adapters: list[str]


class EngineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest_json` is that of the engine's namespace, with an empty list of strands where only a
    running engine knows them, and `page_bytes` are those of its pages, 0 then. `adapters` are the
    digests of those asked for, in hex. `window_interval` is the setting, `state_interval_tokens`
    how far apart the engine keeps states. `problem`, where there is one, is all there is."""

    manifest_json: str = ""
    page_bytes: int = 0
    tokens: list[int] = []
    adapters: list[str] = []
    window_interval: int | None = None
    state_interval_tokens: int = 0
    problem: str = ""


def ask_vllm(question: EngineQuestion) -> EngineIdentity:
    """Takes the ten seconds that vLLM takes to start. Raises UcmError, with vLLM's last words."""
    command = [sys.executable, "-m", DESCRIBER, msgspec.json.encode(question).decode()]
    with tempfile.TemporaryFile() as answers:
        done = subprocess.run(
            [*command, str(answers.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[answers.fileno()],
            text=True,
            check=False,
        )
        answers.seek(0)
        answer = answers.read()
    if not answer:
        last = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise UcmError(f"vLLM could not be asked about {question.model}: {last}")
    identity = msgspec.json.decode(answer, type=EngineIdentity)
    if identity.problem:
        raise UcmError(f"vLLM could not be asked about {question.model}: {identity.problem}")
    return identity
