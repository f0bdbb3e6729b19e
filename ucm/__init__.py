"""UCM: a KV cache for vLLM that lives on storage every node can mount."""
