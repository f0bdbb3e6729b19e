"""What only vLLM can tell of an engine and a prompt, on its way between two processes as JSON.

The `ucm` command runs without vLLM. What it must know of an engine it asks of a process that has
it: `python -m ucm.integration.vllm.describe`, with a question on standard input and the number of a
descriptor to answer on as its argument, as vLLM prints to standard output what it likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Final

import msgspec

from ucm.errors import UcmError
from ucm.store.inspect.given_prompts import GivenPrompt

DESCRIBER: Final = "ucm.integration.vllm.describe"

_LAST_LINES: Final = 3


class EngineQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """`vllm_args` are flags of `vllm serve`, without the model. `config_file`: the settings, empty
    for defaults. There may be no `prompts`, and no `adapters`, folders of LoRA adapters."""

    model: str
    vllm_args: list[str]
    config_file: str
    prompts: list[GivenPrompt] = []
    adapters: list[str]


class EngineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest_json` is that of the engine's namespace, with an empty list of strands where only a
    running engine knows them, and `page_bytes` are those of its pages, 0 then. `tokens` are those
    of each prompt, and `adapters` the digests of those asked for, in hex. `window_interval` is the
    setting, `state_interval_tokens` how far apart the engine keeps states. `problem`, where there
    is one, is all there is."""

    manifest_json: str = ""
    page_bytes: int = 0
    tokens: list[list[int]] = []
    adapters: list[str] = []
    window_interval: int | None = None
    state_interval_tokens: int = 0
    problem: str = ""


def ask_vllm(question: EngineQuestion) -> EngineIdentity:
    """Takes the ten seconds that vLLM takes to start. Raises UcmError, with vLLM's last words."""
    _check_model(question.model)
    try:
        asked = msgspec.json.encode(question)
    except UnicodeEncodeError as error:
        raise UcmError(f"what vLLM is asked about has to be UTF-8: {error}") from error
    with tempfile.TemporaryFile() as answers:
        done = subprocess.run(
            [sys.executable, "-m", DESCRIBER, str(answers.fileno())],
            input=asked,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[answers.fileno()],
            check=False,
        )
        answers.seek(0)
        answer = answers.read()
    if not answer:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = " ".join(" ".join(lines[-_LAST_LINES:]).split())
        raise UcmError(f"vLLM could not be asked about {question.model}: {last}")
    identity = msgspec.json.decode(answer, type=EngineIdentity)
    if identity.problem:
        raise UcmError(identity.problem)
    return identity


def _check_model(model: str) -> None:
    """Of a path, which is no name on Hugging Face. Raises UcmError."""
    is_path = model.startswith((os.sep, ".", "~")) or model.count("/") > 1
    if is_path and "://" not in model and not os.path.exists(model):
        raise UcmError(
            f"--model {model}: is not there: name the model as `vllm serve` is given it, a folder "
            f"or a name on Hugging Face"
        )
