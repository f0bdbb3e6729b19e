"""Starts vLLM's OpenAI server where the `vllm` command is not to be had.

The CPU build is published under another name than vllm, so its command fails on its own metadata.
A script as small as this one also saves seconds: vLLM's engine and worker processes import their
main module again, and `python -m vllm...` would make that the whole HTTP server.
"""

import gc
import multiprocessing
import os
import socket
import stat

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


def close_what_would_not_be_inherited() -> None:
    """In a fork: the server's port. An engine that holds it too is looked up by it when the server
    stops, and where it has just ended then, vLLM 0.32 ends with 1: a zombie has no command line."""
    with open(os.devnull) as nothing:
        for number in map(int, os.listdir("/proc/self/fd")):
            # Not closed: the socket object that is still there would close whatever comes next.
            if _is_a_port(number):
                os.dup2(nothing.fileno(), number)


def _is_a_port(number: int) -> bool:
    """Whether that is a TCP socket with an address of its own and nobody at its other end."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        with socket.socket(fileno=os.dup(number)) as held:
            is_tcp = held.family in {socket.AF_INET, socket.AF_INET6}
            return is_tcp and held.getsockname()[1] != 0 and not _has_peer(held)
    except OSError:  # what listed the folder has closed it
        return False


def _has_peer(held: socket.socket) -> bool:
    try:
        held.getpeername()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    if os.environ.get(FORK_VARIABLE):
        fork_what_would_be_spawned()
        os.register_at_fork(after_in_child=close_what_would_not_be_inherited)
        # What is imported is the same in all processes, as long as nobody writes to it.
        gc.freeze()
    main()
