"""Starts vLLM's OpenAI server where the `vllm` command is not to be had.

The CPU build is published under another name than vllm, so its command fails on its own metadata.
A script as small as this one also saves seconds: vLLM's engine and worker processes import their
main module again, and `python -m vllm...` would make that the whole HTTP server.
"""

import gc
import multiprocessing
import os

# With it in the environment, a server's engine and worker are forks of its first process, as they
# are with vLLM's own default, which its CPU platform overrides. They import nothing then: a start
# takes less than half of the time and half of the memory. But they lack the libraries that
# the platform would have preloaded into them, which make them faster with several threads.
FORK_VARIABLE = "UCM_CLUSTER_FORK"

# vLLM's modules make millions of objects, none of them garbage. To look for it among them again and
# again is a quarter of the time that each of a server's three processes takes to start.
gc.set_threshold(20_000, 20, 20)


def fork_what_would_be_spawned() -> None:
    get_context = multiprocessing.get_context
    # A module's function, and of the same type: mypy wants no assignment to it.
    setattr(  # noqa: B010
        multiprocessing,
        "get_context",
        lambda method=None: get_context("fork" if method == "spawn" else method),
    )


if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    if os.environ.get(FORK_VARIABLE):
        fork_what_would_be_spawned()
        # What is imported is the same in all processes, as long as nobody writes to it.
        gc.freeze()
    main()
