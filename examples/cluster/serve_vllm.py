"""Starts vLLM's OpenAI server where the `vllm` command is not to be had.

The CPU build is published under another name than vllm, so its command fails on its own metadata.
A script as small as this one also saves seconds: vLLM's engine and worker processes import their
main module again, and `python -m vllm...` would make that the whole HTTP server.
"""

import gc

# vLLM's modules make millions of objects, none of them garbage. To look for it among them again and
# again is a quarter of the time that each of a server's three processes takes to start.
gc.set_threshold(20_000, 20, 20)

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
