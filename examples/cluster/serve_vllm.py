"""Starts vLLM's OpenAI server where the `vllm` command is not to be had.

The CPU build is published under another name than vllm, so its command fails on its own metadata.
A script as small as this one also saves seconds: vLLM's engine and worker processes import their
main module again, and `python -m vllm...` would make that the whole HTTP server.
"""

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
